"""The scored front: one study of score against cost, from which any budget between two ends can be had."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from optuna.trial import Trial
from torch import nn

from kronsearch.budget import Span, read_span
from kronsearch.choices import SamplerName, SensitivityName, check_choices, check_length
from kronsearch.errors import StudyError
from kronsearch.plan import Plan
from kronsearch.progress import Phase, PhaseClock, Watcher, ignore
from kronsearch.search.allocate import Allocation
from kronsearch.search.candidates import pareto
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.decoders import Allocate
from kronsearch.search.draft import Draft
from kronsearch.search.finals import Finalist, Finals
from kronsearch.search.finish import final_plan
from kronsearch.search.fronts import make_plans_folder, plan_name, save_front
from kronsearch.search.pace import Pace
from kronsearch.search.reach import check_reachable
from kronsearch.search.sampling import new_sampler
from kronsearch.search.space import SearchSpace
from kronsearch.search.stopwatch import Setting
from kronsearch.search.storage import kept, url_of
from kronsearch.search.study import Given, objective_of, save_table
from kronsearch.search.subject import Subject
from kronsearch.search.work import Aim, Work
from kronsearch.training.data import Data
from kronsearch.training.modes import own_modes

__all__ = ["ScoredFront", "ScoredPoint", "search_front"]

_PLACE = "budget"  # of a trial between the ends of the span
_PLACES = (0.5, 0.0, 1.0, 0.25, 0.75)  # of the plain allocations that a study begins with
_MEASURED = ("score", "error", "divergence")


@dataclass(frozen=True)
class ScoredPoint:
    """A plan that no other plan of the study is better than at no more cost.

    Args:
        plan: the plan, with its score.
        measured: `score`, its standard `error`, and the `divergence` from the dense network.
        name: of the plan's file, below the folder of the results.
    """

    plan: Plan
    measured: Mapping[str, float]
    name: str


@dataclass(frozen=True)
class ScoredFront:
    """What a search for a front hands back.

    Args:
        points: from the least cost to the most; the divergence falls.
        trials: a row for each finished trial.
        left: how many of those that were asked for are not finished, for the time was over.
        out: where the files are, None if none were asked for.
        seconds: of each phase, in this call.
        tuning: seconds of these that fine-tunes took, their evaluations included.
    """

    points: tuple[ScoredPoint, ...]
    trials: pd.DataFrame
    left: int
    out: Path | None
    seconds: Mapping[Phase, float]
    tuning: float

    @property
    def table(self) -> pd.DataFrame:
        """A row for each point, as in `front.csv`."""
        rows = [
            {
                "trial": point.plan.provenance.trial,
                "budget_flops": point.plan.budget.flops,
                "budget_params": point.plan.budget.params,
                "macs": point.plan.compressed.macs,
                "params": point.plan.compressed.params,
                **point.measured,
                "predicted_error": point.plan.predicted_error,
                "plan": point.name,
            }
            for point in self.points
        ]
        return pd.DataFrame(rows)


class _Alike(Allocate):
    """Asks the same of every trial, whichever candidates latency leaves at its budget."""

    def __init__(self, plain: Problem) -> None:
        self._plain = plain

    def suggest(self, trial: Trial, problem: Problem) -> Weighing:
        """Ask the sampler for a weighing."""
        del problem
        return super().suggest(trial, self._plain)


class _FrontWork(Work):
    """The state of a search for a front: a trial is asked for its budget, too."""

    def __init__(self, subject: Subject, span: Span, draft: Draft, allow_slower: bool, setting: Setting) -> None:
        self._span, self._allow_slower, self._stopwatch = span, allow_slower, subject.stopwatch(setting)
        pace = self._pace(0.0)
        super().__init__(subject, pace.limits(subject.cost), draft, pace, Allocate())
        self._pace(1.0).limits(subject.cost)  # if the dense network keeps that already, it is refused

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a study is resumed."""
        return super().identity | {"budget": str(self._span), "objective": "divergence and cost"}

    def set_problem(self, trials: int) -> None:
        """Measure, decompose, and set what the trials are about."""
        del trials
        self.set_tables()  # latency is looked at for each budget
        self.decoder = _Alike(self.plain)

    def aim(self, trial: Trial) -> Aim:
        """Return what a trial is about at the budget that the sampler proposes."""
        pace = self._pace(trial.suggest_float(_PLACE, 0.0, 1.0))
        limits = pace.limits(self.subject.cost)
        problem = pace.problem(replace(self.plain, limits=limits))
        return Aim(problem, replace(self.draft, budget=pace.budget), pace)

    def objectives(self, value: float, allocation: Allocation) -> tuple[float, ...]:
        """Return the divergence, and the cost that the budgets differ in as a part of the dense network's."""
        cost = self._span.limited
        return value, allocation.costs[cost] / self.plain.dense[cost]

    def given(self) -> Given:
        """Give plain allocations at budgets from end to end."""
        plain = self.decoder.given(self.plain)(0) or {}
        return lambda slot: {_PLACE: _PLACES[slot], **plain} if slot < len(_PLACES) else None

    def _pace(self, place: float) -> Pace:
        return Pace(self._span.at(place), self._stopwatch, self._allow_slower)


@own_modes()
def search_front(
    model: nn.Module,
    data: Data,
    *,
    flops: str | int | None = None,
    params: str | int | None = None,
    sampler: SamplerName = "gp",
    sensitivity: SensitivityName = "measured",
    trials: int = 20,
    timeout: float | None = None,
    space: SearchSpace | str | Path = "default",
    storage: str | None = None,
    study: str | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    latency_batch: int = 1,
    latency_threads: int = 1,
    allow_slower: bool = False,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    watch: Watcher = ignore,
) -> ScoredFront:
    """Search, in one study, for the plans that diverge least from a network at each cost between two ends.

    A trial is asked for a budget, besides how errors are weighed; what is minimised is the divergence, measured as in
    `search`, and the cost. The study begins with plain allocations at up to five budgets. The plans than which none is
    better are scored after a proxy fine-tune, and make the front as far as none is better after it. Called again
    likewise, it resumes.

    Args:
        model: the trained network; left untouched.
        data: what it was trained on.
        flops: bounds on the MACs of one example between two ends, such as `25%:90%` or `1G:3G`; or one bound, if
            `params` has two ends.
        params: bounds on the number of parameters, likewise.
        sampler: as that of a search, but for `cmaes`, which knows one objective only.
        sensitivity: as that of a search.
        trials: how many finished trials there shall be in the end.
        timeout: seconds after which no further trial is begun.
        space: a search space, its name, or a YAML file.
        storage: as that of a search.
        study: likewise.
        out: folder for `front.csv`, `plans/`, `trials.csv` (and `study.db`).
        cache: as that of a search.
        device: to run on.
        seed: of everything random.
        latency_batch: as that of a search.
        latency_threads: likewise.
        allow_slower: likewise.
        model_spec: how the model is called in the plans.
        model_args: what it was constructed with, for the plans.
        watch: is told of every step.

    Raises:
        KronsearchError: of a kind that says what can't be done and what is possible instead.
    """
    span = read_span(flops=flops, params=params)
    if data is None:
        raise StudyError("there are no data to score plans on: pass some, or take `sweep`, which needs none")
    check_length(trials, timeout)
    check_choices(sampler=sampler)
    if sampler == "cmaes":
        raise StudyError("the sampler cmaes knows one objective only: choose gp, tpe or random for a front")
    new_sampler(sampler, 0)  # if it can't be had, nothing is begun
    started, phases = time.monotonic(), PhaseClock(watch)
    folder = None if out is None else Path(out)
    subject = Subject(
        model,
        data,
        space=space,
        device=device,
        seed=seed,
        out=folder,
        cache=cache,
        sensitivity=sensitivity,
        watch=phases,
    )
    draft = Draft(subject.space, span.at(0), subject.settings, seed, model_spec, dict(model_args or {}))
    work = _FrontWork(subject, span, draft, allow_slower, Setting(latency_batch, latency_threads))
    check_reachable(subject.cost, subject.space, work.limits)
    url = url_of(storage, folder)
    with kept(url):
        ledger = work.open(url, study, folder, objectives=2, sampler=sampler, sensitivity=sensitivity)
        if folder is not None:
            make_plans_folder(folder)
        work.all_trials(ledger, trials, ends=None if timeout is None else started + timeout, folder=folder)
        finals = Finals(ledger, higher_is_better=work.higher_is_better)
        work.play(finals)
        front, table = _unbeaten(finals.finalists(), span.limited), finals.table()
        left = work.left(ledger, trials)
    if not front:
        raise StudyError("no plan has a score: all of them diverged; ask for more --trials")
    points = tuple(_point(finalist, ledger.name, data) for finalist in front)
    found = ScoredFront(points, table, left, folder, phases.seconds, work.tuning)
    if folder is not None:
        save_table(found.trials, folder)
        save_front({point.name: point.plan for point in points}, found.table, folder)
    return found


def _unbeaten(finalists: list[Finalist], cost: str) -> list[Finalist]:
    """Return those that diverge less than all that cost no more, from the least cost to the most."""
    costs = np.array([each.trial.user_attrs[cost] for each in finalists])
    front = pareto([costs], np.array([objective_of(each.measured) for each in finalists]))
    return [finalists[index] for index in front[np.argsort(costs[front])]]


def _point(finalist: Finalist, study: str, data: Data) -> ScoredPoint:
    told = finalist.measured.user_attrs
    measured = {name: float(told[name]) for name in _MEASURED if told.get(name) is not None}
    plan = final_plan(finalist.trial, study, finalist.score(data.task.metric_name))
    return ScoredPoint(plan, measured, plan_name(f"trial-{finalist.trial.number}"))
