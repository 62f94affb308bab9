"""The front: what the plain allocation gives for many budgets, from one set of error tables and no evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from kronsearch.budget import Budget, budgets
from kronsearch.choices import SensitivityName
from kronsearch.errors import BudgetError
from kronsearch.plan import Latency, Plan, PlanBudget
from kronsearch.progress import Watcher, ignore
from kronsearch.search.allocate import Allocation
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.draft import Draft
from kronsearch.search.fronts import make_plans_folder, plan_name, save_front
from kronsearch.search.pace import Pace, specs_of
from kronsearch.search.reach import check_reachable
from kronsearch.search.space import SearchSpace
from kronsearch.search.stopwatch import Setting
from kronsearch.search.subject import Subject
from kronsearch.training.data import Data
from kronsearch.training.modes import own_modes

__all__ = ["Front", "Point", "sweep"]

_PLAIN = Weighing()


@dataclass(frozen=True)
class Point:
    """What one budget gives.

    Args:
        plan: the plan; its provenance holds the proven gap.
        weighed_error: the mean of the layers' squared errors as the allocation weighs them: what it made smallest.
        name: of the plan's file, below the folder of the results.
    """

    plan: Plan
    weighed_error: float
    name: str


@dataclass(frozen=True)
class Front:
    """The points of a sweep in ascending order of their budgets, and the folder of their files, if one was asked for.

    A point never has a larger weighed error than one of a smaller budget that was chosen from the same candidates.
    """

    points: tuple[Point, ...]
    out: Path | None

    @property
    def table(self) -> pd.DataFrame:
        """A row for each point, as in `front.csv`."""
        rows = [
            {
                "budget_flops": point.plan.budget.flops,
                "budget_params": point.plan.budget.params,
                "max_macs": point.plan.budget.max_macs,
                "max_params": point.plan.budget.max_params,
                "macs": point.plan.compressed.macs,
                "params": point.plan.compressed.params,
                "predicted_error": point.plan.predicted_error,
                "weighed_error": point.weighed_error,
                "gap": point.plan.provenance.gap,
                **({} if (taken := point.plan.latency) is None else _latency(point.plan.budget, taken)),
                "plan": point.name,
            }
            for point in self.points
        ]
        return pd.DataFrame(rows)


def _latency(budget: PlanBudget, taken: Latency) -> dict[str, object]:
    return {"budget_latency": budget.latency, "latency_ms": taken.compressed_ms, "latency_ratio": taken.ratio}


@own_modes()
def sweep(
    model: nn.Module,
    data: Data | None = None,
    *,
    flops: str | int | None = None,
    params: str | int | None = None,
    latency: str | None = None,
    sensitivity: SensitivityName = "measured",
    space: SearchSpace | str | Path = "default",
    out: str | Path | None = None,
    cache: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    latency_batch: int = 1,
    latency_threads: int = 1,
    allow_slower: bool = False,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    watch: Watcher = ignore,
) -> Front:
    """Return the plan of the plain allocation, which is trial 0 of a search, for each of many budgets.

    It measures and decomposes what a search does, once, and takes it from the same cache. Nothing is fine-tuned or
    scored.

    Args:
        model: the trained network; left untouched.
        data: what it was trained on; without, the errors are of the weights alone.
        flops: bounds on the MACs of one example, such as `25%:90%:20` (from, to, how many) or `1G,2G`; or one bound, if
            `params` has several.
        params: bounds on the number of parameters, likewise.
        latency: bounds on the measured latency, likewise, such as `4ms:8ms:5`.
        sensitivity: as that of a search.
        space: a search space, its name, or a YAML file.
        out: folder for `front.csv` and `plans/`.
        cache: as that of a search.
        input_shape: of one example; by default the data's.
        device: to run on.
        seed: of the images that statistics are gathered on.
        latency_batch: as that of a search.
        latency_threads: likewise.
        allow_slower: likewise.
        model_spec: how the model is called in the plans.
        model_args: what it was constructed with, for the plans.
        watch: is told of every step.

    Raises:
        KronsearchError: of a kind that says what can't be done and what is possible instead.
    """
    asked = budgets(flops=flops, params=params, latency=latency)
    folder = None if out is None else Path(out)
    subject = Subject(
        model,
        data,
        space=space,
        input_shape=input_shape,
        device=device,
        seed=seed,
        out=folder,
        cache=cache,
        sensitivity=sensitivity,
        watch=watch,
    )
    cost = subject.cost
    stopwatch = subject.stopwatch(Setting(latency_batch, latency_threads))
    paces = {budget: Pace(budget, stopwatch, allow_slower) for budget in asked}
    limits = {budget: pace.limits(cost) for budget, pace in paces.items()}
    asked.sort(key=lambda budget: [*limits[budget].given.values()])
    check_reachable(cost, subject.space, limits[asked[0]])
    if folder is not None:
        make_plans_folder(folder)
    candidates, weights = subject.tables(subject.prepared())
    problems = [paces[budget].problem(Problem(cost, limits[budget], candidates, weights)) for budget in asked]
    total = sum(weight**_PLAIN.trust for weight in weights.values()) or 1.0
    points = []
    allocations = _allocations(problems, [paces[budget] for budget in asked], subject)
    for budget, problem, allocation in zip(asked, problems, allocations, strict=True):
        draft = Draft(subject.space, budget, subject.settings, seed, model_spec, dict(model_args or {}))
        specs = specs_of(problem.candidates, allocation)
        taken = stopwatch.compare(specs) if paces[budget].bounded else None
        points.append(Point(draft.plan(problem, allocation, taken), allocation.error / total, _file_of(budget)))
    front = Front(tuple(points), folder)
    if folder is not None:
        save_front({point.name: point.plan for point in points}, front.table, folder)
    return front


def _allocations(problems: Sequence[Problem], paces: Sequence[Pace], subject: Subject) -> list[Allocation]:
    """Return the best allocation for each problem, of all of the same candidates that were found and keep its bounds.

    What the solver leaves open, up to the gap, could otherwise make a larger budget the worse one. A budget of latency
    is kept by what was measured.

    Raises:
        BudgetError: a budget can't be reached.
    """
    found = []
    for done, (problem, pace) in enumerate(zip(problems, paces, strict=True)):
        subject.tell("budgets", done, len(problems))
        if (kept := pace.allocate(problem, _PLAIN)) is None:
            raise BudgetError(f"no plan within {pace.budget} was found: ask for a looser one")
        found.append(kept[0])
    subject.tell("budgets", len(problems), len(problems))
    best = []
    for problem, own, pace in zip(problems, found, paces, strict=True):
        alike = (other for other, its in zip(found, problems, strict=True) if its.candidates is problem.candidates)
        fitting = [other for other in alike if problem.bounds.hold(**other.costs)]
        fitting.sort(key=lambda other: other.error)
        least = next((other for other in fitting if pace.checked(problem, other) is not None), own)
        proven = own.error * (1 - own.gap)
        gap = max(0.0, (least.error - proven) / least.error) if least.error > 0 else 0.0
        best.append(replace(least, gap=gap))
    return best


def _file_of(budget: Budget) -> str:
    """Return the name of the file of a budget's plan."""
    return plan_name("-".join(f"{name}-{amount}" for name, amount in budget.given.items()))
