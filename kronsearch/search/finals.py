"""The finalists of a search: its best plans, fine-tuned briefly before one of them wins."""

from typing import NamedTuple

import pandas as pd
from optuna.trial import FrozenTrial, Trial

from kronsearch.plan import Score
from kronsearch.search.sampling import PLAIN, SLOT
from kronsearch.search.score import Scorer
from kronsearch.search.study import DIGEST, SCORE, Study, objective_of, plan_of
from kronsearch.search.trial import outcome, tune
from kronsearch.training.evaluate import within_error

__all__ = ["TUNED", "Finalist", "Finals"]

TUNED = "tuned_"  # begins the names of a table's columns that tell of finalists
_BEST = 4  # plans, besides the plain allocation's
_TOLD = (SCORE, "error", "divergence")


class Finalist(NamedTuple):
    """A plan that was measured in the finals.

    Args:
        trial: of the search.
        measured: holds what its plan was measured to be worth: a trial of the finals.
    """

    trial: FrozenTrial
    measured: FrozenTrial

    def score(self, metric: str) -> Score:
        """Return the score as it stands in a plan, given the metric's name."""
        told = self.measured.user_attrs
        return Score(metric=metric, value=float(told[SCORE]), examples=int(told.get("examples") or 0))


class Finals:
    """The finals of a study: its best plans and the plain allocation's are scored after a proxy fine-tune.

    What is left of a plan before a fine-tune is not all that is left after it, and the best of many trials is the one
    that this flatters most; the plain allocation is hard to beat. Of a study with several objectives those plans are
    finalists than which none is better. The study of the finals lies beside the other one, and is resumed, and shared
    by workers, as any is. A slot in there is the digest of a plan.

    Args:
        trials: the study of the search.
        higher_is_better: the direction of the score.
    """

    def __init__(self, trials: Study, *, higher_is_better: bool) -> None:
        self._trials, self.ledger = trials, trials.beside("finals", told=(SCORE,))
        self._sign = -1 if higher_is_better else 1

    @property
    def slots(self) -> list[str]:
        """The digests of the finalists, as the trials stand; those that diverged have left their places to others."""
        several = self._trials.objectives > 1
        diverged = {trial.user_attrs[SLOT] for trial in self.ledger.finished()}
        diverged -= {trial.user_attrs[SLOT] for trial in self.ledger.ended()}
        best = self._trials.front() if several else self._trials.ranked()
        left = [
            digest for digest in dict.fromkeys(trial.user_attrs[DIGEST] for trial in best) if digest not in diverged
        ]
        if several:
            return left
        plain = {trial.user_attrs[DIGEST] for trial in best if trial.user_attrs[SLOT] == PLAIN}
        return [*(each for each in left if each in plain), *[each for each in left if each not in plain][:_BEST]]

    def finalists(self) -> list[Finalist]:
        """Return all that were measured here and came to their end, with fewer trials too; of twins the first."""
        owners = self._owners()
        return [  # what has no owner is of a study that is there no more
            Finalist(owner, final)
            for final in self.ledger.ended()
            if (owner := owners.get(final.user_attrs[SLOT])) is not None
        ]

    def winner(self) -> Finalist | None:
        """Return the finalist with the best score, None if there are none.

        Of those whose scores differ from the best by no more than the standard error of the difference, it is the one
        of the least objective, which is finer: at half of ResNet-32's MACs the best scores differ by one image in
        2,500. Of equals it is the earlier one.
        """
        finalists = self.finalists()
        if not finalists:
            return None
        best = min(finalists, key=lambda each: self._merit(each.measured))
        alike = [
            each
            for each in finalists
            if within_error(
                self._merit(each.measured) - self._merit(best.measured), _error(each.measured), _error(best.measured)
            )
        ]
        return min(alike, key=lambda each: (objective_of(each.measured), each.trial.number))

    def score(self, trial: Trial, scorer: Scorer, seed: int) -> str:
        """Score a finalist, and return what came of it in a few words.

        Args:
            trial: of the finals.
            scorer: of the search.
            seed: of the fine-tune.
        """
        owner = self._owners()[trial.user_attrs[SLOT]]
        value = tune(trial, plan_of(owner), scorer, seed=seed)
        self.ledger.tell(trial, *(() if value is None else (value,)))
        return f"trial {owner.number} {outcome(trial, value)}"

    def table(self) -> pd.DataFrame:
        """Return the table of the trials, and beside them how finalists ended and what these are worth."""
        table = self._trials.table()
        finals = self.ledger.table()
        if finals.empty:
            return table
        finals = finals.set_index(SLOT).reindex(columns=["state", *_TOLD])
        return table.join(finals.add_prefix(TUNED), on=DIGEST)

    def _owners(self) -> dict[str, FrozenTrial]:
        """Return the first trial of each plan, by its digest."""
        return {trial.user_attrs[DIGEST]: trial for trial in reversed(self._trials.ended())}

    def _merit(self, measured: FrozenTrial) -> float:
        return self._sign * float(measured.user_attrs[SCORE])


def _error(measured: FrozenTrial) -> float:
    """Return the standard error of a score."""
    return float(measured.user_attrs.get("error") or 0.0)
