"""The Optuna study: opening and resuming it, what a trial is asked for, and telling what came of it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState

from kronsearch.choices import SamplerName
from kronsearch.errors import StudyError, differences, first_line
from kronsearch.files import replacing
from kronsearch.plan import Plan, parse_plan
from kronsearch.search.sampling import GIVEN, SLOT, new_sampler
from kronsearch.search.storage import MALFORMED, hidden, open_study
from kronsearch.search.workers import BEAT, WORKER, Lookout, Pulse, is_gone, new_worker

__all__ = [
    "DIGEST",
    "OBJECTIVE",
    "OVER",
    "PLAN",
    "SCORE",
    "Given",
    "Identity",
    "Slot",
    "Study",
    "objective_of",
    "plan_of",
    "save_table",
]

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_BEGUN = (*_FINISHED, TrialState.RUNNING)
PLAN, DIGEST, SCORE, OVER = "plan", "digest", "score", "over"
OBJECTIVE = "divergence from the dense network"
_IDENTITY = "identity"
_COMPLETE = "complete"  # how a trial ended that can win
_UNTOLD = (PLAN, WORKER, BEAT, _IDENTITY)  # in the table

Identity = Mapping[str, Any]
Slot = TypeVar("Slot", int, str)
Given = Callable[[int], Mapping[str, float] | None]


class Study:
    """A study in a storage, opened for one worker.

    What it minimises, and what the sampler sees, is not the score but how far a network's outputs diverge
    from the dense one's: a network that has memorised its training images scores 0.998 to 1 on a part of them whatever
    the plan, so that the score says next to nothing and the divergence still orders the plans. The score is kept beside
    it.

    Each of the finished trials that are wanted is a slot, a number or a name, and a slot is given out once: a trial
    comes into being with its slot and its worker, storages number trials one after the other, and where two begin one
    slot at the same moment the one with the lower number has it. The sampler is seeded anew for each trial by its slot,
    and trials that failed tell it nothing, so that a single worker that resumes a study asks what it would have asked.

    By default it is a Gaussian process. A trial whose plan is over a budget is complete for it, with an objective and a
    constraint to learn from; only it can't win. Pruned is one without any objective.

    The settings that a study was made with are those of its first trial: each comes into being with its own, so that of
    workers which begin with different ones all but one are refused, and a study without trials takes any.

    A worker that ends before its trial does leaves it running. Whoever asks next closes it as failed and its slot is
    free again: at once where both are on one machine, after minutes without a sign of life where they aren't.

    Args:
        storage: its URL, see `open_study`; None is memory.
        name: of the study in it.
        identity: what must not differ when it is resumed: model, data, budget, seed, ….
        seed: of the sampler.
        sampler: what proposes parameters, see `new_sampler`.
        objectives: how many numbers are minimised.
        told: what is written to every trial that can win.

    Raises:
        StudyError: the storage can't be opened or is damaged, the study was made with another identity, or has trials
            that are not of its kind.
    """

    def __init__(
        self,
        storage: str | None,
        name: str,
        identity: Identity,
        *,
        seed: int,
        sampler: SamplerName = "gp",
        objectives: int = 1,
        told: Sequence[str] = (),
    ) -> None:
        self.seed, self.name, self.objectives = seed, name, objectives
        self._storage, self._identity, self._sampler = storage, dict(identity), sampler
        self._me, self._lookout = new_worker(), Lookout()
        self._study = open_study(storage, name, objectives)
        self._told, self._where = tuple(told), f"the study {name!r} in {hidden(storage or 'memory')}"
        trials, known = self._first_look()
        fits = len(self._study.directions) == objectives
        if (known is None and (trials or not fits)) or not isinstance(known, dict | None):
            raise StudyError(f"{self._where} is not kronsearch's: pass another --study or --storage")
        self.others()  # what was given up counts for nothing
        begun = self._study.get_trials(deepcopy=False, states=_BEGUN)
        if known is not None and (begun or not fits):
            self._check_identity(begun[0].user_attrs.get(_IDENTITY, known) if begun else known)
        if known != self._identity:
            self._study.set_user_attr(_IDENTITY, self._identity)
        self.finished()

    def _first_look(self) -> tuple[list[FrozenTrial], Any]:
        """Return all trials and the identity, whatever it is.

        Raises:
            StudyError: something in the storage is not what Optuna writes.
        """
        try:
            trials = self._study.get_trials(deepcopy=False)  # before the identity: it is written before any trial
            for trial in trials:
                if trial.number is None or not isinstance(trial.user_attrs.get(_IDENTITY, {}), dict):
                    raise ValueError(f"trial {trial.number} has no number, or other settings than a trial can have")
            return trials, self._study.user_attrs.get(_IDENTITY)
        except MALFORMED as error:
            raise StudyError(
                f"{self._where} is damaged, or others wrote to it ({first_line(error)}): pass another --study or --out"
            ) from error

    def beside(self, name: str, *, told: Sequence[str]) -> "Study":
        """Open the study that belongs to this one and has this name behind its own, in the same storage.

        Args:
            name: the end of its name.
            told: what is written to every trial that can win.

        Raises:
            StudyError: as of a study.
        """
        return Study(
            self._storage,
            f"{self.name} {name}",
            self._identity,
            seed=self.seed,
            sampler="random",
            told=told,
        )

    def finished(self) -> list[FrozenTrial]:
        """Return the finished trials, those that can't win among them, in the order of their numbers.

        Raises:
            StudyError: one of them lacks what ours are told.
        """
        trials = self._study.get_trials(deepcopy=False, states=_FINISHED)
        for trial in trials:
            missing = [] if isinstance(trial.user_attrs.get(SLOT), int | str) else [SLOT]
            if trial.state is TrialState.COMPLETE and not trial.values:
                missing.append("objective")
            if _state(trial) == _COMPLETE:
                missing += [name for name in self._told if trial.user_attrs.get(name) is None]
            if missing:
                raise StudyError(
                    f"{self._where} is damaged, or others wrote to it: trial {trial.number} has no "
                    f"{' and no '.join(missing)}; pass another --study or --out"
                )
        return trials

    def ended(self) -> list[FrozenTrial]:
        """Return the finished trials that can win, in the order of their numbers."""
        return [trial for trial in self.finished() if _state(trial) == _COMPLETE]

    def left(self, slots: Iterable[Slot]) -> list[Slot]:
        """Return which of these slots aren't finished."""
        finished = {trial.user_attrs.get(SLOT) for trial in self.finished()}
        return [slot for slot in slots if slot not in finished]

    def ranked(self) -> list[FrozenTrial]:
        """Return the trials that can win, those of the least (first) objective first; of equals the first one."""
        return sorted(self.ended(), key=lambda trial: (objective_of(trial), trial.number))

    def front(self) -> list[FrozenTrial]:
        """Return the trials than which none is better in one objective and no worse in others; of twins the first."""
        best = sorted(self._study.best_trials, key=lambda trial: trial.number, reverse=True)
        return list({trial.user_attrs[DIGEST]: trial for trial in best}.values())

    def ask(self, slots: Iterable[Slot], given: Callable[[Slot], Mapping[str, float] | None]) -> Trial | None:
        """Begin a trial that nobody else runs or has run.

        Args:
            slots: the trials that there shall be in the end.
            given: maps a slot to parameters that are set beforehand, or to None.

        Returns:
            The trial, or None if all slots are finished or in the hands of other workers.

        Raises:
            StudyError: a worker with other settings has begun the study.
        """
        while True:
            running = {trial.user_attrs.get(SLOT) for trial in self.others()}
            slot = next((slot for slot in self.left(slots) if slot not in running), None)
            if slot is None:
                return None
            trial = self._claim(slot, given(slot))
            if trial is not None:
                return trial

    def others(self) -> list[FrozenTrial]:
        """Return the running trials of workers that live, after closing those of workers that are gone."""
        live = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if not isinstance(worker, dict) or is_gone(worker, self._me) or self._lookout.is_silent(trial):
                self._close(trial.number, TrialState.FAIL)
            else:
                live.append(trial)
        return live

    @contextmanager
    def at_work(self, trial: Trial) -> Iterator[None]:
        """Show other workers that this one lives; work on a trial that one of them has taken over ends early."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError), Pulse(trial):
            yield

    def tell(self, trial: Trial, *values: float) -> bool:
        """End a trial: with its objectives, or as pruned without; False if another worker has taken it over."""
        return self._close(trial, TrialState.COMPLETE if values else TrialState.PRUNED, values or None)

    def table(self) -> pd.DataFrame:
        """Return a row for each finished trial: number, state, score, times, parameters, what was measured."""
        rows = []
        for trial in self.finished():
            row: dict[str, Any] = {"trial": trial.number, "state": _state(trial)}
            row[SCORE] = trial.user_attrs.get(SCORE)
            row["seconds"] = trial.duration.total_seconds() if trial.duration else None
            row |= {key: value for key, value in trial.user_attrs.items() if key not in _UNTOLD}
            rows.append(row | trial.params)
        return pd.DataFrame(rows)

    def _claim(self, slot: int | str, given: Mapping[str, float] | None) -> Trial | None:
        """Begin the trial of a slot; None if another worker was first, StudyError if one with other settings was."""
        claim = optuna.create_trial(  # one write: nobody ever sees a trial without its slot and its worker
            state=TrialState.RUNNING,
            user_attrs={SLOT: slot, WORKER: self._me, _IDENTITY: self._identity},
            system_attrs={} if given is None else {GIVEN: dict(given)},
        )
        self._study.add_trial(claim)
        trials = self._study.get_trials(deepcopy=False, states=_BEGUN)
        rivals = [trial for trial in trials if trial.user_attrs.get(SLOT) == slot]
        mine = next(t for t in rivals if t.state is TrialState.RUNNING and t.user_attrs.get(WORKER) == self._me)
        try:
            for trial in trials[: trials.index(mine)]:
                self._check_identity(trial.user_attrs.get(_IDENTITY, self._identity))
        except StudyError:
            self._close(mine.number, TrialState.FAIL)
            raise
        if any(rival.number < mine.number for rival in rivals):
            self._close(mine.number, TrialState.FAIL)
            return None
        digest = hashlib.sha256(f"{self.seed}/{slot}".encode()).digest()
        self._study.sampler = new_sampler(self._sampler, int.from_bytes(digest[:4], "big"))
        return Trial(self._study, mine._trial_id)

    def _check_identity(self, known: Identity) -> None:
        if differing := differences(known, self._identity):
            raise StudyError(
                f"{self._where} was made with other settings ({differing}): "
                "repeat them to resume it, or pass another --study or --out"
            )

    def _close(self, trial: Trial | int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """End a trial, unless another worker did; return whether it is in this state now."""
        try:
            return self._study.tell(trial, values, state=state, skip_if_finished=True).state is state
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def objective_of(trial: FrozenTrial) -> float | None:
    """Return the objective of a finished trial, the first where there are several; None of one without."""
    return trial.values[0] if trial.state is TrialState.COMPLETE else None


def plan_of(trial: FrozenTrial) -> Plan:
    """Return the plan that is stored with a trial.

    Raises:
        PlanError: it is malformed.
    """
    return parse_plan(str(trial.user_attrs[PLAN]), origin=f"the plan of trial {trial.number}")


def save_table(table: pd.DataFrame, folder: Path) -> None:
    """Write a table of trials as `trials.csv`."""
    with replacing(folder / "trials.csv") as path:
        table.to_csv(path, index=False)


def _state(trial: FrozenTrial) -> str:
    """Return how a finished trial ended."""
    if OVER in trial.user_attrs:
        return "over budget"
    return _COMPLETE if trial.state is TrialState.COMPLETE else "pruned"
