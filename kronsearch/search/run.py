"""The whole search: from a network, data and a budget to a plan and a compressed network."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from optuna.trial import Trial
from torch import nn

from kronsearch.budget import Budget, Limits
from kronsearch.errors import StudyError
from kronsearch.files import make_folder, replacing
from kronsearch.models.apply import apply_plan, load_compressed
from kronsearch.models.checkpoint import fingerprint_weights
from kronsearch.plan import Plan, save_plan
from kronsearch.search.decode import Problem
from kronsearch.search.draft import Draft
from kronsearch.search.finish import final_plan, finish, is_done, tested
from kronsearch.search.pace import Pace
from kronsearch.search.prepare import Prepared
from kronsearch.search.progress import Phase, PhaseClock, Watcher, ignore
from kronsearch.search.reach import check_reachable
from kronsearch.search.score import Scorer
from kronsearch.search.space import SearchSpace
from kronsearch.search.stopwatch import Setting
from kronsearch.search.study import OBJECTIVE, PLAN, SCORE, Study, given_trials, suggest
from kronsearch.search.subject import Subject
from kronsearch.search.summary import Summary, summarise
from kronsearch.search.trial import outcome, score
from kronsearch.training.data import Data
from kronsearch.training.evaluate import Evaluation
from kronsearch.training.finetune import StepReport

__all__ = ["SearchResult", "search"]

_PATIENCE = 1.0  # seconds between two looks at what other workers do


@dataclass(frozen=True)
class SearchResult:
    """What a search hands back.

    Args:
        plan: the winner's.
        model: the compressed network, after the final fine-tune.
        dense: the dense network on the test split, None without data.
        compressed: the compressed network likewise.
        trials: a row for each finished trial.
        out: where the files are, None if none were asked for.
        seconds: of each phase, in this call.
        tuning: seconds of these in which a network was trained.
    """

    plan: Plan
    model: nn.Module
    dense: Evaluation | None
    compressed: Evaluation | None
    trials: pd.DataFrame
    out: Path | None
    seconds: Mapping[Phase, float]
    tuning: float

    @property
    def summary(self) -> Summary:
        """What the trials came to."""
        return summarise(self.trials, self.plan.provenance.trial or 0)

    @property
    def gap(self) -> float:
        """The winning allocation's proven relative gap."""
        return self.plan.provenance.gap or 0.0


def search(
    model: nn.Module,
    data: Data | None = None,
    *,
    budget: Budget,
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
    final_epochs: float = 2.0,
    latency_batch: int = 1,
    latency_threads: int = 1,
    allow_slower: bool = False,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    watch: Watcher = ignore,
) -> SearchResult:
    """Search for the best compression of a network under a budget; called again with the same settings, it resumes.

    With data a trial is scored by the task's metric on the validation split after a proxy fine-tune, and what is
    minimised is the divergence from the dense network's outputs there, which is finer; without, it is the predicted
    error, which the plain allocation has proven to be lowest, so that one trial is all there is to do.

    Args:
        model: the trained network; left untouched.
        data: what it was trained on.
        budget: upper bounds on MACs, parameters and latency.
        trials: how many finished trials there shall be in the end, pruned ones included.
        timeout: seconds after which no further trial is begun.
        space: a search space, its name, or a YAML file.
        storage: of the study: URL of a database, or one that `open_study` explains; by default `study.db` in `out`, or
            memory where there is no `out`. Searches with the same storage and settings share its trials.
        study: its name in the storage, `kronsearch` by default.
        out: folder for `plan.json`, `compressed.safetensors`, `trials.csv` (and `study.db`).
        cache: folder for the statistics of activations and the error tables, which any search of the same weights, data
            and seed takes from there, and for what was timed; by default `cache` in `out`, or none where there is no
            `out`.
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
    if trials < 1:
        raise StudyError(f"{trials} trials are asked for: ask for one at least")
    if final_epochs < 0:
        raise StudyError(f"{final_epochs} final epochs are asked for: ask for 0 or more")
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
        watch=phases,
    )
    pace = Pace(budget, subject.stopwatch(Setting(latency_batch, latency_threads)), allow_slower)
    limits = pace.limits(subject.cost)
    check_reachable(subject.cost, subject.space, limits)
    draft = Draft(subject.space, budget, subject.settings, seed, model_spec, dict(model_args or {}))
    run = _Run(subject, limits, draft, pace)
    if storage is None and folder is not None:
        make_folder(folder)
        storage = f"sqlite:///{folder / 'study.db'}"
    ledger = Study(storage, study or "kronsearch", run.identity, higher_is_better=run.higher_is_better, seed=seed)
    if folder is not None:
        make_folder(folder)
    wanted = run.wanted(trials)
    if len(ledger.finished()) < wanted:
        run.set_problem()
    run.begin(ledger, wanted)
    while (done := len(ledger.finished())) < wanted:
        late = bool(done) and timeout is not None and time.monotonic() - started > timeout
        trial = None if late else ledger.ask(wanted, given_trials(run.problem))
        if trial is not None:
            with ledger.at_work(trial):
                run.trial(ledger, trial, wanted)
            if folder is not None:
                _save_table(ledger.table(), folder)
        elif others := ledger.others():  # the winner is chosen among all trials, theirs too
            run.wait(len(others), done, wanted)
        elif late:
            break
    best = ledger.best()
    if best is None:
        raise StudyError("no trial has a score: all of them diverged or were pruned; ask for more --trials")
    plan = pace.measured(final_plan(best, ledger.name, data))
    small = run.finish(plan, final_epochs, folder)
    if folder is not None:
        save_plan(plan, folder / "plan.json")
        _save_table(ledger.table(), folder)
    dense, compressed = run.test(small)
    return SearchResult(plan, small, dense, compressed, ledger.table(), folder, phases.seconds, run.tuning)


class _Run:
    """The state of one search."""

    def __init__(self, subject: Subject, limits: Limits, draft: Draft, pace: Pace) -> None:
        self.subject, self.limits, self.draft, self.pace = subject, limits, draft, pace
        self.data, self.dense, self.device = subject.data, subject.dense, subject.device
        self._scorer: Scorer | None = None
        self._waited: int | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.data is not None and self.data.task.higher_is_better

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a study is resumed."""
        return {
            "model": self.draft.model_spec or type(self.dense).__name__,
            "weights": fingerprint_weights(self.dense)[:16],
            "data": None if self.data is None else self.data.fingerprint[:16],
            "input shape": list(self.subject.cost.input_shape),
            "budget": str(self.draft.budget),
            "space": self.draft.space.model_dump_json(),
            "seed": self.draft.seed,
            "objective": OBJECTIVE if self.data is not None else "predicted error",
            **self.pace.identity,
        }

    def wanted(self, trials: int) -> int:
        return trials if self.data is not None else 1

    def set_problem(self) -> None:
        """Measure, decompose, and set what the trials are about."""
        prepared = self.subject.prepared()
        candidates, sensitivity = self.subject.tables(prepared)
        self.problem = self.pace.problem(Problem(self.subject.cost, self.limits, candidates, sensitivity))
        self._scorer = self._scorer_with(prepared)

    def scorer(self) -> Scorer | None:
        """Return the one scorer, None without data."""
        if self._scorer is None and self.data is not None:
            self._scorer = self._scorer_with(self.subject.prepared())
        return self._scorer

    @property
    def tuning(self) -> float:
        """Seconds in which a network was trained."""
        return 0.0 if self._scorer is None else self._scorer.tuning

    def _scorer_with(self, prepared: Prepared) -> Scorer | None:
        if self.data is None:
            return None
        return Scorer(self.dense, self.data, prepared.metrics, self.subject.settings, self.device)

    def begin(self, ledger: Study, wanted: int) -> None:
        """Tell that trials are next."""
        best = ledger.best()
        known = None if best is None else best.user_attrs[SCORE]
        self.subject.tell("trials", len(ledger.finished()), wanted, best=known)

    def wait(self, others: int, done: int, wanted: int) -> None:
        """Leave other workers time to end their trials; tell so once for each that ends."""
        if done != self._waited:
            self._waited = done
            self.subject.tell("trials", done, wanted, f"waiting for other workers, which run {others}")
        time.sleep(_PATIENCE)

    def trial(self, ledger: Study, trial: Trial, wanted: int) -> None:
        """Run one trial to its end."""
        found = self.pace.allocate(self.problem, suggest(trial, self.problem))
        if found is None:
            ledger.tell(trial, None)
            done = len(ledger.finished())
            self.subject.tell("trials", done, wanted, f"trial {trial.number} missed the budget of latency")
            return
        allocation, latency = found
        plan = self.draft.plan(self.problem, allocation, latency)
        digest = hashlib.sha256(repr(sorted(plan.replaced.items())).encode()).hexdigest()[:16]
        twin = next((t for t in ledger.finished() if t.user_attrs.get("digest") == digest), None)
        for key, attribute in (
            (PLAN, plan.model_dump_json()),
            ("digest", digest),
            ("macs", plan.compressed.macs),
            ("params", plan.compressed.params),
            ("predicted_error", plan.predicted_error),
            ("gap", allocation.gap),
            *(() if latency is None else (("latency_ms", latency.compressed_ms), ("latency_ratio", latency.ratio))),
        ):
            trial.set_user_attr(key, attribute)
        value = score(trial, plan, self.scorer(), twin, seed=self.draft.seed)
        if not ledger.tell(trial, value):
            return
        best = ledger.best()
        self.subject.tell(
            "trials",
            len(ledger.finished()),
            wanted,
            f"trial {trial.number} {outcome(trial, value)}",
            best=None if best is None else best.user_attrs[SCORE],
            macs=plan.compressed.macs,
            params=plan.compressed.params,
        )

    def finish(self, plan: Plan, epochs: float, folder: Path | None) -> nn.Module:
        """Return the winner, fine-tuned and measured; written to a folder, or read from there if it was done before."""
        path = None if folder is None else folder / "compressed.safetensors"
        epochs = epochs if self.data is not None else 0.0
        if path is not None and is_done(path, plan, epochs):
            return load_compressed(self.dense, path, plan).to(self.device)
        scorer = self.scorer()
        small = apply_plan(self.dense, plan, device=self.device) if scorer is None else scorer.build(plan.replaced)
        finish(small, plan, scorer, epochs=epochs, seed=self.draft.seed, path=path, tell=self._tell_final)
        return small

    def test(self, small: nn.Module) -> tuple[Evaluation | None, Evaluation | None]:
        """Evaluate the dense and the compressed network on the test split."""
        if self.data is None:
            return None, None
        return tested(self.dense, small, self.data, self.device, lambda done: self.subject.tell("test", done, 2))

    def _tell_final(self, report: StepReport) -> None:
        self.subject.tell("final", report.step, report.total_steps, f"loss {report.loss:.4f}")


def _save_table(table: pd.DataFrame, folder: Path) -> None:
    with replacing(folder / "trials.csv") as path:
        table.to_csv(path, index=False)
