"""What a search gained, told from its finished trials."""

from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from kronsearch.search.finals import LONGER
from kronsearch.search.sampling import PLAIN
from kronsearch.search.study import DIGEST

__all__ = ["Agreement", "Summary", "summarise"]

_FIDELITIES = ("predicted_error", "settled_divergence", "divergence")  # what is known of a plan, by what it costs
_FEWEST = 5  # plans to tell a rank correlation of


@dataclass(frozen=True)
class Agreement:
    """How well one measure orders plans like another.

    Args:
        cheap: name of the column that costs less to know.
        dear: of the other one.
        correlation: Spearman's rank correlation of the two.
        n: number of different plans that it is of: those whose trials have both, and for the last column ended.
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
        pruned: how many of them were stopped early, or diverged.
        finalists: how many plans were fine-tuned longer; 0 where there was nothing to choose from.
        winner: the number of the winner.
        plain: score of the plain allocation, with which every study begins; None if it has none. This and what follows
            is after the longer fine-tune, if the winner had that.
        best: the winner's.
        plain_divergence: of the plain allocation's outputs from the dense network's; None if it isn't known.
        best_divergence: the winner's.
        agreements: of the measures that come before the last with it and each other, where there are enough plans.
    """

    trials: int
    pruned: int
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
    ended = trials[trials["state"] == "complete"]
    plain = ended[ended["slot"] == PLAIN]
    longer = LONGER if _number(won, f"{LONGER}score") is not None else ""
    state = f"{LONGER}state"
    finalists = int(trials.dropna(subset=[state])[DIGEST].nunique()) if state in trials else 0
    best = _number(won, f"{longer}score")
    assert best is not None
    return Summary(
        trials=len(trials),
        pruned=len(trials) - len(ended),
        finalists=finalists,
        winner=winner,
        plain=None if plain.empty else _number(plain.iloc[0], f"{longer}score"),
        best=best,
        plain_divergence=None if plain.empty else _number(plain.iloc[0], f"{longer}divergence"),
        best_divergence=_number(won, f"{longer}divergence"),
        agreements=tuple(
            found
            for cheap, dear in combinations(_FIDELITIES, 2)
            if (found := _agreement(ended if dear == _FIDELITIES[-1] else trials, cheap, dear)) is not None
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


def _number(row: "pd.Series[float]", name: str) -> float | None:
    return float(row[name]) if name in row.index and pd.notna(row[name]) else None
