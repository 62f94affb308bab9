"""The Optuna study: opening and resuming it, what a trial is asked for, and telling what came of it."""

import hashlib
import math
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from kronsearch.errors import StudyError
from kronsearch.search.decode import Problem, Weighing

__all__ = ["FINISHED", "OBJECTIVE", "PLAN", "SCORE", "Identity", "Study", "given_trials", "suggest"]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
PLAN, SCORE = "plan", "score"
OBJECTIVE = "divergence from the dense network"
_IDENTITY, _WORKER = "identity", "worker"
_IMPORTANCE, _PRICE = 1.0, 0.7  # bounds of the logarithms: a factor of 2.7 and of 2 either way
_STARTUP = 6  # trials before the sampler models anything; the first ones are given

Identity = Mapping[str, Any]


class Study:
    """A study in a storage, opened for one worker.

    What it minimises, and what the sampler and the pruner see, is not the score but how far a network's outputs diverge
    from the dense one's: a network that has memorised its training images scores 0.998 to 1 on a part of them whatever
    the plan, so that the score says next to nothing and the divergence still orders the plans. The score is kept beside
    it, and chooses the winner as far as it can tell.

    Trials that an earlier worker of this machine left behind when it died are closed as failed, and their place is
    taken by a new trial. The sampler is seeded anew for each trial by how many are finished, so that a resumed study
    asks what it would have asked.

    Args:
        storage: an Optuna storage URL, such as `sqlite:///study.db`; None is memory.
        name: of the study in it.
        identity: what must not differ when it is resumed: model, data, budget, seed, ….
        higher_is_better: the direction of the score; the objective is always minimised.
        seed: of the sampler.

    Raises:
        StudyError: the storage can't be opened, or the study was made with another identity.
    """

    def __init__(
        self, storage: str | None, name: str, identity: Identity, *, higher_is_better: bool, seed: int
    ) -> None:
        self.seed, self.name, self.higher_is_better = seed, name, higher_is_better
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction="minimize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
                load_if_exists=True,
            )
            known = self._study.user_attrs.get(_IDENTITY)
            trials = self._study.get_trials(deepcopy=False)
        except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise StudyError(
                f"can't open the storage {storage} ({reason}): pass an Optuna URL such as sqlite:///study.db"
            ) from error
        if (known is None and trials) or not isinstance(known, dict | None):
            raise StudyError(f"the study {name!r} in {storage} is not kronsearch's: pass another --study or --storage")
        if known is None:
            self._study.set_user_attr(_IDENTITY, dict(identity))
        elif known != dict(identity):
            differing = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
            told = "; ".join(f"{key} was {known.get(key)}, is {identity.get(key)}" for key in differing)
            raise StudyError(
                f"the study {name!r} in {storage} was made with other settings ({told}): "
                "repeat them to resume it, or pass another --study or --out"
            )
        self._bury_the_dead()

    def finished(self) -> list[FrozenTrial]:
        """Return the finished trials, pruned ones among them, in the order of their numbers."""
        return self._study.get_trials(deepcopy=False, states=FINISHED)

    def best(self) -> FrozenTrial | None:
        """Return the winner among the complete trials, None if there are none.

        Scores that differ from the best by no more than the standard error of the difference are alike; among those the
        one of least objective wins, which is finer: at half of ResNet-32's MACs the best scores differ by one image in
        2,500. Of equals it is the first.
        """
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        sign = -1 if self.higher_is_better else 1
        ranked = sorted(complete, key=lambda trial: (sign * _score(trial), trial.number))
        if not ranked:
            return None
        best, error = sign * _score(ranked[0]), _error(ranked[0])
        alike = [
            trial
            for trial in ranked  # both errors count: that of a score without a fault is zero
            if sign * _score(trial) - best <= math.hypot(error, _error(trial)) * (1 + 1e-9)
        ]
        return min(alike, key=lambda trial: trial.value or 0.0)

    def ask(self, given: Callable[[int], Mapping[str, float] | None]) -> Trial:
        """Begin a trial. `given` maps the number of finished trials to parameters that are set beforehand, or None."""
        index = len(self.finished())
        digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=_STARTUP, constant_liar=False, seed=int.from_bytes(digest[:4], "big")
        )
        parameters = given(index)
        if parameters is not None and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self._study.enqueue_trial(dict(parameters))
        trial = self._study.ask()
        trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")
        return trial

    def tell(self, trial: Trial, value: float | None) -> None:
        """End a trial: with its objective, or as pruned with None."""
        if value is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)

    def table(self) -> pd.DataFrame:
        """Return a row for each finished trial: number, state, score, times, parameters, what was measured."""
        rows = []
        for trial in self.finished():
            row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower()}
            row[SCORE] = trial.user_attrs.get(SCORE)
            row["seconds"] = trial.duration.total_seconds() if trial.duration else None
            row |= {key: value for key, value in trial.user_attrs.items() if key not in (PLAN, _WORKER)}
            rows.append(row | trial.params)
        return pd.DataFrame(rows)

    def _bury_the_dead(self) -> None:
        """Close running trials whose worker was on this machine and is gone."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, _, pid = str(trial.user_attrs.get(_WORKER, "")).rpartition(":")
            if not pid.isdecimal() or (host == socket.gethostname() and not _alive(int(pid))):
                self._study.tell(trial.number, state=TrialState.FAIL)


def _score(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get(SCORE) or 0.0)


def _error(trial: FrozenTrial) -> float:
    """Return the standard error of a trial's score."""
    return float(trial.user_attrs.get("error") or 0.0)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this worker has asked for nothing yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def suggest(trial: Trial, problem: Problem) -> Weighing:
    """Ask the sampler for a weighing."""
    return Weighing(
        trust=trial.suggest_float("trust", 0.0, 1.0),
        curvature=trial.suggest_float("curvature", 0.6, 1.4),
        importance={
            group: trial.suggest_float(f"importance/{group}", -_IMPORTANCE, _IMPORTANCE) for group in problem.groups
        },
        price={kind: trial.suggest_float(f"price/{kind}", -_PRICE, _PRICE) for kind in problem.structures},
    )


def given_trials(problem: Problem) -> Callable[[int], Mapping[str, float] | None]:
    """Return the trials that every study begins with: the plain allocation, then other trust in the sensitivities."""
    plain = {"curvature": 1.0}
    plain |= {f"importance/{group}": 0.0 for group in problem.groups}
    plain |= {f"price/{kind}": 0.0 for kind in problem.structures}
    first = [{"trust": trust, **plain} for trust in (0.5, 1.0, 0.0)]
    return lambda index: first[index] if index < len(first) else None
