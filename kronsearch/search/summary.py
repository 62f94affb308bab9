"""What a search gained, told from its finished trials."""

from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from kronsearch.search.finals import TUNED
from kronsearch.search.sampling import PLAIN
from kronsearch.search.study import DIGEST

__all__ = ["Agreement", "Summary", "summarise"]

_FIDELITIES = ("predicted_error", "divergence", f"{TUNED}divergence")  # what is known of a plan, by what it costs
_FEWEST = 5  # plans to tell a rank correlation of


@dataclass(frozen=True)
class Agreement:
    """How well one measure orders plans like another.

    Args:
        cheap: name of the column that costs less to know.
        dear: of the other one.
        correlation: Spearman's rank correlation of the two.
        n: number of different plans that it is of: those whose trials have both.
    """

    cheap: str
    dear: str
    correlation: float
    n: int


@dataclass(frozen=True)
class Summary:
    """What the trials of a study came to.

    Args:
        trials: how many are finished.
        failed: how many of them can't win: they missed a budget, or diverged.
        finalists: how many plans were fine-tuned.
        winner: the number of the winner.
        plain: score of the plain allocation after its fine-tune, with which every study begins; None if it has none.
        best: the winner's.
        plain_divergence: of the plain allocation's outputs from the dense network's after it; None if it isn't known.
        best_divergence: the winner's.
        agreements: of what is known of a plan, where there are enough plans: each with what costs more to know.
    """

    trials: int
    failed: int
    finalists: int
    winner: int
    plain: float | None
    best: float
    plain_divergence: float | None
    best_divergence: float | None
    agreements: tuple[Agreement, ...]


def summarise(trials: pd.DataFrame, winner: int) -> Summary:
    """Return the summary of a study's table and the number of its winner."""
    won = trials[trials["trial"] == winner].iloc[0]
    first = trials[trials["slot"] == PLAIN]
    plain = None if first.empty else first.iloc[0]
    score, divergence = f"{TUNED}score", f"{TUNED}divergence"
    return Summary(
        trials=len(trials),
        failed=int((trials["state"] != "complete").sum()),
        finalists=int(trials.dropna(subset=[f"{TUNED}state"])[DIGEST].nunique()),
        winner=winner,
        plain=_number(plain, score),
        best=float(won[score]),
        plain_divergence=_number(plain, divergence),
        best_divergence=_number(won, divergence),
        agreements=tuple(
            found
            for cheap, dear in combinations(_FIDELITIES, 2)
            if (found := _agreement(trials, cheap, dear)) is not None
        ),
    )


def _agreement(trials: pd.DataFrame, cheap: str, dear: str) -> Agreement | None:
    if not {cheap, dear, DIGEST} <= set(trials.columns):
        return None
    both = trials.drop_duplicates(DIGEST)[[cheap, dear]].dropna()
    if len(both) < _FEWEST or (both.nunique() < 2).any():
        return None
    ranks = both.rank()
    return Agreement(cheap, dear, float(ranks[cheap].corr(ranks[dear])), len(both))


def _number(row: "pd.Series[float] | None", name: str) -> float | None:
    return None if row is None or name not in row.index or pd.isna(row[name]) else float(row[name])
