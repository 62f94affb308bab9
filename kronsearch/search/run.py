"""The whole search: from a network, data and a budget to a plan and a compressed network."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from kronsearch.budget import Budget
from kronsearch.choices import DecoderName, SamplerName, SensitivityName, check_choices, check_length
from kronsearch.errors import BudgetError, StudyError, check_kind
from kronsearch.finetuning.loop import COMPRESSED
from kronsearch.models.checkpoint import check_storable
from kronsearch.plan import Plan, save_plan
from kronsearch.progress import Phase, PhaseClock, Watcher, ignore
from kronsearch.search.decoders import new_decoder
from kronsearch.search.draft import Draft
from kronsearch.search.finals import Finals
from kronsearch.search.finish import final_plan
from kronsearch.search.pace import Pace
from kronsearch.search.reach import check_reachable
from kronsearch.search.sampling import new_sampler
from kronsearch.search.space import SearchSpace
from kronsearch.search.stopwatch import Setting
from kronsearch.search.storage import kept, url_of
from kronsearch.search.study import Study, save_table
from kronsearch.search.subject import Subject
from kronsearch.search.summary import Summary, summarise
from kronsearch.search.work import Work
from kronsearch.training.data import Data
from kronsearch.training.evaluate import Evaluation
from kronsearch.training.modes import own_modes

__all__ = ["SearchResult", "search"]


@dataclass(frozen=True)
class SearchResult:
    """What a search hands back.

    Args:
        plan: the winner's.
        model: the compressed network, after the final fine-tune.
        dense: the dense network on the test split, None without data.
        compressed: the compressed network likewise.
        trials: a row for each finished trial.
        left: how many of those that were asked for are not finished, for the time was over.
        out: where the files are, None if none were asked for.
        seconds: of each phase, in this call.
        tuning: seconds of these that fine-tunes took, their evaluations included.
    """

    plan: Plan
    model: nn.Module
    dense: Evaluation | None
    compressed: Evaluation | None
    trials: pd.DataFrame
    left: int
    out: Path | None
    seconds: Mapping[Phase, float]
    tuning: float

    @property
    def summary(self) -> Summary | None:
        """What the trials came to; None without data, where there is but one."""
        return None if self.plan.score is None else summarise(self.trials, self.plan.provenance.trial or 0)

    @property
    def gap(self) -> float:
        """The winning allocation's proven relative gap."""
        return self.plan.provenance.gap or 0.0


@own_modes()
def search(
    model: nn.Module,
    data: Data | None = None,
    *,
    budget: Budget,
    decoder: DecoderName = "allocate",
    sampler: SamplerName = "gp",
    sensitivity: SensitivityName = "measured",
    trials: int = 20,
    timeout: float | None = None,
    space: SearchSpace | str | Path = "default",
    storage: str | None = None,
    study: str | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    final_epochs: float = 10.0,
    latency_batch: int = 1,
    latency_threads: int = 1,
    allow_slower: bool = False,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    watch: Watcher = ignore,
) -> SearchResult:
    """Search for the best compression of a network under a budget; called again with the same settings, it resumes.

    With data trials minimise the divergence from the dense network's outputs, measured on training images before any
    fine-tune; the best plans and the plain allocation's are scored by the task's metric on the validation split after a
    proxy fine-tune, and one of them wins, see `Finals`. Without data, it is the predicted error, which the plain
    allocation has proven to be lowest: one trial is all there is to do.

    Args:
        model: the trained network; left untouched.
        data: what it was trained on.
        budget: upper bounds on MACs, parameters and latency.
        decoder: what a trial decides: `allocate`, how errors are weighed in an allocation under the budget; `direct`,
            each layer's place between its most expensive and its cheapest candidate, which may overstep the budget.
        sampler: what proposes it: `gp`, `tpe`, `cmaes` (which needs the package of this name) or `random`.
        sensitivity: what tells how much a layer's error matters: `measured`, how far the outputs change when it alone
            is replaced; `fisher`, an estimate of that; `inputs`, what the layer itself puts out; `absolute`, its
            kernel's squared norm; `plain`, nothing. Without data the first three are the last.
        trials: how many finished trials there shall be in the end, those that can't win included.
        timeout: seconds after which no further trial is begun; the finals and the final fine-tune follow.
        space: a search space, its name, or a YAML file.
        storage: of the study: URL of a database, or one that `open_study` explains; by default `study.db` in `out`, or
            memory where there is no `out`. Searches with the same storage and settings share its trials.
        study: its name in the storage, `kronsearch` by default; `NAME finals` is the study of its finals.
        out: folder for `plan.json`, `compressed.safetensors`, `trials.csv`, `final/` (and `study.db`); without it the
            state of the final fine-tune goes to a temporary folder, and the rest nowhere.
        cache: folder for the statistics of activations, the error tables and the sensitivities, which any search of the
            same weights, data and seed takes from there, and for contributions and what was timed; by default `cache`
            in `out`, or none where there is no `out`.
        input_shape: of one example; by default the data's.
        device: to run on.
        seed: of everything random.
        final_epochs: of the winner's fine-tune with the dense network as teacher; 0 for none.
        latency_batch: examples in a run where latency is measured.
        latency_threads: threads of torch there.
        allow_slower: whether layers may become slower than they are. Else that is avoided where it can be, see
            `Pace.problem`; with it and no budget of latency, nothing is timed.
        model_spec: how the model is called in the plan.
        model_args: what it was constructed with, for the plan.
        watch: is told of every step.

    Raises:
        KronsearchError: of a kind that says what can't be done and what is possible instead.
    """
    check_kind('a budget is a Budget, such as Budget(flops="50%")', budget, Budget, BudgetError)
    check_length(trials, timeout)
    if not 0 <= final_epochs < math.inf:
        raise StudyError(f"{final_epochs} final epochs are asked for: ask for 0 or more")
    check_choices(decoder=decoder, sampler=sampler)  # the sensitivity is the subject's
    new_sampler(sampler, 0)  # if it can't be had, nothing is begun
    started = time.monotonic()
    folder = None if out is None else Path(out)
    phases = PhaseClock(watch)
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
        watch=phases,
    )
    if folder is not None or (data is not None and final_epochs > 0):
        check_storable(subject.dense.state_dict(), (folder or Path()) / COMPRESSED)
    pace = Pace(budget, subject.stopwatch(Setting(latency_batch, latency_threads)), allow_slower)
    limits = pace.limits(subject.cost)
    check_reachable(subject.cost, subject.space, limits)
    draft = Draft(subject.space, budget, subject.settings, seed, model_spec, dict(model_args or {}))
    run = Work(subject, limits, draft, pace, new_decoder(decoder))
    url = url_of(storage, folder)
    with kept(url):
        ledger = run.open(url, study, folder, decoder=decoder, sampler=sampler, sensitivity=sensitivity)
        finals = Finals(ledger, higher_is_better=run.higher_is_better)
        run.all_trials(ledger, trials, ends=None if timeout is None else started + timeout, folder=folder)
        run.play(finals)
        table, left, winner = finals.table(), run.left(ledger, trials), _winner(ledger, finals, data)
    if folder is not None:
        save_table(table, folder)
    plan = pace.measured(winner)
    small = run.finish(plan, final_epochs, folder)
    if folder is not None:
        save_plan(plan, folder / "plan.json")
    dense, compressed = run.test(small)
    return SearchResult(plan, small, dense, compressed, table, left, folder, phases.seconds, run.tuning)


def _winner(ledger: Study, finals: Finals, data: Data | None) -> Plan:
    """Return the plan that won: in the finals, or without data in the trials.

    Raises:
        StudyError: none did.
    """
    if not ledger.ended():
        raise StudyError("no trial has a plan that can win: all missed a budget or diverged; ask for more --trials")
    if data is None:
        return final_plan(ledger.ranked()[0], ledger.name, None)
    won = finals.winner()
    if won is None:
        raise StudyError("no plan has a score: all finalists diverged in their fine-tune; ask for a looser budget")
    return final_plan(won.trial, ledger.name, won.score(data.task.metric_name))
