"""The finalists of a search: its best plans and the plain allocation's, fine-tuned longer before one of them wins."""

from typing import NamedTuple

import pandas as pd
from optuna.trial import FrozenTrial, Trial

from kronsearch.plan import parse_plan
from kronsearch.search.sampling import PLAIN, SLOT
from kronsearch.search.score import Scorer
from kronsearch.search.study import DIGEST, PLAN, SCORE, Study, was_stopped
from kronsearch.search.trial import outcome, score_longer

__all__ = ["LONGER", "Finals", "Winner"]

LONGER = "longer_"  # begins the names of a table's columns that tell of finalists
_BEST = 2  # plans, besides the plain allocation's
_TOLD = (SCORE, "error", "divergence")


class Winner(NamedTuple):
    """Who won.

    Args:
        trial: of the search.
        measured: holds what its plan was measured to be worth: a trial of the finals, or the same where there is none.
    """

    trial: FrozenTrial
    measured: FrozenTrial


class Finals:
    """The finals of a study: its best plans and the plain allocation's are scored once more, after a longer fine-tune.

    What a short fine-tune leaves of a plan is not all that a long one will, and the best of many trials is the one that
    this flatters most; the plain allocation is hard to beat. The study of the finals lies beside the other one, and is
    resumed, and shared by workers, as any is. A slot in there is the digest of a plan.

    Args:
        trials: the study of the search.
        ledger: that of its finals.
    """

    def __init__(self, trials: Study, ledger: Study) -> None:
        self._trials, self.ledger = trials, ledger

    @property
    def slots(self) -> list[str]:
        """The digests of the finalists, as the trials stand; none where one plan is all that there is."""
        best: dict[str, FrozenTrial] = {}
        for trial in self._trials.ranked():
            best.setdefault(trial.user_attrs[DIGEST], trial)
        plain = [trial.user_attrs[DIGEST] for trial in self._trials.ended() if trial.user_attrs[SLOT] == PLAIN]
        chosen = [*plain, *[digest for digest in best if digest not in plain][:_BEST]]
        return chosen if len(chosen) > 1 else []

    def winner(self) -> Winner | None:
        """Return who won, None if no trial came to its end.

        That is the best of all plans that were measured here, with fewer trials too; where there are none, or all
        diverged, it is the best trial.
        """
        ranked = self._trials.ranked()
        first = {trial.user_attrs[DIGEST]: trial for trial in reversed(ranked)}
        for final in self.ledger.ranked():
            if final.user_attrs[SLOT] in first:  # else it is of a study that is there no more
                return Winner(first[final.user_attrs[SLOT]], final)
        return Winner(ranked[0], ranked[0]) if ranked else None

    def score(self, trial: Trial, scorer: Scorer, seed: int) -> str:
        """Score a finalist, and return what came of it in a few words.

        Args:
            trial: of the finals.
            scorer: of the search.
            seed: of the fine-tune.
        """
        owner = next(t for t in self._trials.ended() if t.user_attrs[DIGEST] == trial.user_attrs[SLOT])
        plan = parse_plan(str(owner.user_attrs[PLAN]), origin=f"the plan of trial {owner.number}")
        value = score_longer(trial, plan, scorer, seed=seed)
        self.ledger.tell(trial, *(() if value is None else (value,)))
        return f"trial {owner.number} {'diverged' if value is None else outcome(trial, value)}"

    def table(self) -> pd.DataFrame:
        """Return the table of the trials, and beside them how finalists ended and what these are worth."""
        table = self._trials.table()
        finals = {trial.user_attrs[SLOT]: trial for trial in self.ledger.finished()}
        if not finals:
            return table
        own = [finals.get(digest) for digest in table[DIGEST]]
        table[f"{LONGER}state"] = [
            None if final is None else "diverged" if was_stopped(final) else "complete" for final in own
        ]
        for name in _TOLD:
            table[f"{LONGER}{name}"] = [None if final is None else final.user_attrs.get(name) for final in own]
        return table
