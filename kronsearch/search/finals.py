"""The finalists of a search: its best plans and the plain allocation, fine-tuned longer before one of them wins."""

from dataclasses import dataclass
from typing import Self

import pandas as pd
from optuna.trial import FrozenTrial, Trial

from kronsearch.plan import parse_plan
from kronsearch.search.sampling import PLAIN, SLOT
from kronsearch.search.score import LONGER_IMAGES, Scorer
from kronsearch.search.study import PLAN, SCORE, Study
from kronsearch.search.trial import outcome, score_longer

__all__ = ["LONGER", "Finals"]

LONGER = "longer_"  # begins the names of what was measured of finalists in a table of trials
_MOST = 3  # finalists
_TOLD = (SCORE, "error", "divergence")


@dataclass(frozen=True)
class Finals:
    """The finalists of a study of trials, and the study in which these are scored after a longer fine-tune.

    The best of many trials owes a part of its lead to the noise of what it was chosen by, and what a short fine-tune
    leaves of a plan is not all that a long one will. So the best of them are measured once more, and beside them the
    plain allocation, which is hard to beat. Their study lies in the same storage; a trial's slot in there is the
    number that the finalist has as a trial. So it is resumed, and shared by workers, as any study is.

    Args:
        ranked: the trials that came to their end, the best first.
        slots: the numbers of the finalists among them; none if there is nothing to choose from.
        ledger: their study, None if there are none.
    """

    ranked: list[FrozenTrial]
    slots: tuple[int, ...]
    ledger: Study | None

    @classmethod
    def of(cls, trials: Study) -> Self:
        """Return the finals of a study whose trials are done.

        Raises:
            StudyError: the study of finalists can't be opened.
        """
        ranked = trials.ranked()
        slots = _finalists(ranked)
        return cls(ranked, slots, trials.beside("finalists", images=LONGER_IMAGES) if slots else None)

    @property
    def winner(self) -> tuple[FrozenTrial, FrozenTrial] | None:
        """The trial that won, and the one that holds what it was measured to be worth; None if there is no trial.

        The second is that of the finals, or the first itself where nothing was to be chosen, or all finalists diverged.
        """
        finals = [] if self.ledger is None else self.ledger.ranked()
        for final in finals:
            if final.user_attrs[SLOT] in self.slots:
                return self._trial(final.user_attrs[SLOT]), final
        return (self.ranked[0], self.ranked[0]) if self.ranked else None

    def score(self, trial: Trial, scorer: Scorer, seed: int) -> str:
        """Score a finalist, and return what came of it in a few words.

        Args:
            trial: of the study of finalists.
            scorer: of the search.
            seed: of the fine-tune.
        """
        assert self.ledger is not None
        number = int(trial.user_attrs[SLOT])
        plan = parse_plan(str(self._trial(number).user_attrs[PLAN]), origin=f"the plan of trial {number}")
        value = score_longer(trial, plan, scorer, seed=seed)
        self.ledger.tell(trial, *(() if value is None else (value,)))
        return f"trial {number} {outcome(trial, value)}"

    def table(self, trials: pd.DataFrame) -> pd.DataFrame:
        """Return a study's table with what finalists were measured to be worth beside their trials."""
        finals = {} if self.ledger is None else {t.user_attrs[SLOT]: t.user_attrs for t in self.ledger.ended()}
        if not finals:
            return trials
        joined = trials.copy()
        for name in _TOLD:
            joined[f"{LONGER}{name}"] = [finals.get(number, {}).get(name) for number in trials["trial"]]
        return joined

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.ranked if trial.number == number)


def _finalists(ranked: list[FrozenTrial]) -> tuple[int, ...]:
    """Return the numbers of the plain allocation and the best others, all of different plans; none if one is all."""
    chosen: dict[str, FrozenTrial] = {}
    for trial in [*(trial for trial in ranked if trial.user_attrs[SLOT] == PLAIN), *ranked]:
        if len(chosen) < _MOST:
            chosen.setdefault(str(trial.user_attrs.get("digest")), trial)
    return tuple(trial.number for trial in chosen.values()) if len(chosen) > 1 else ()
