"""Which candidates' times are measured, and what is concluded for the others. Nothing here looks at a clock."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from kronsearch.models.profile import ModelCost
from kronsearch.search.candidates import Candidates, at_rank
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["Group", "Ratio", "deal", "digest", "groups_of"]

_RANKS = 4  # of a sequence that are measured, at the most


@dataclass(frozen=True)
class Ratio:
    """A candidate's time as a part of the dense layer's, and the standard error of that."""

    value: float
    error: float

    @property
    def slower(self) -> bool:
        """Whether it takes longer than the dense layer, beyond the error."""
        return self.value - self.error > 1


@dataclass
class Group:
    """The layers that are alike: of the same kernel shape and geometry, called with inputs of the same sizes.

    Attributes:
        key: what makes them alike.
        layers: their names.
        ranks: of each sequence, how many candidates of all layers have each R_1.
        known: the ratios that were measured, by the digest of the spec.
    """

    key: dict[str, object]
    layers: list[str] = field(default_factory=list)
    ranks: dict[SeKronSpec, Counter[int]] = field(default_factory=dict)
    known: dict[int, Ratio] = field(default_factory=dict)

    def common(self) -> list[SeKronSpec]:
        """Return the sequences, those of most candidates first."""
        return sorted(self.ranks, key=lambda unit: -self.ranks[unit].total())

    def lowest(self, unit: SeKronSpec) -> SeKronSpec:
        """Return a sequence at the lowest of its ranks."""
        return at_rank(unit, min(self.ranks[unit]))

    def is_slower(self, unit: SeKronSpec) -> bool:
        """Tell whether a sequence is slower than the dense layer at its lowest rank, which was measured."""
        return self.known[digest(self.lowest(unit))].slower

    def grid(self, unit: SeKronSpec) -> list[SeKronSpec]:
        """Return a sequence at a few of its ranks, geometrically from the lowest to the highest."""
        low, high = min(self.ranks[unit]), max(self.ranks[unit])
        return [at_rank(unit, rank) for rank in sorted({round(rank) for rank in np.geomspace(low, high, _RANKS)})]

    def ratios(
        self, unit: SeKronSpec, ranks: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return ratio and error at each of these R_1, None unless all of the sequence's grid was measured.

        Between the ranks of the grid the time is taken for linear, and it is taken to grow with the rank.
        """
        grid = self.grid(unit)
        found = [known for spec in grid if (known := self.known.get(digest(spec))) is not None]
        if len(found) < len(grid):
            return None
        places = [spec.ranks[0] for spec in grid]
        growing = isotonic_regression([ratio.value for ratio in found]).x
        return np.interp(ranks, places, growing), np.interp(ranks, places, [ratio.error for ratio in found])


def groups_of(candidates: Sequence[Candidates], cost: ModelCost) -> list[Group]:
    """Return the groups of layers that are alike."""
    groups: dict[str, Group] = {}
    for layer in candidates:
        own = cost.layer(layer.name)
        key: dict[str, object] = {
            "shape": list(layer.kernel_shape),
            "geometry": repr(own.geometry),
            "calls": [*map(list, own.calls)],
        }
        group = groups.setdefault(repr(key), Group(key))
        group.layers.append(layer.name)
        for sequence, rank in zip(layer.sequence[1:].tolist(), layer.rank[1:].tolist(), strict=True):
            group.ranks.setdefault(layer.sequences[sequence], Counter())[rank] += 1
    return list(groups.values())


def deal(wanted: Iterable[tuple[Group, SeKronSpec]]) -> list[dict[str, tuple[Group, SeKronSpec]]]:
    """Return as few line-ups as hold each spec once, in one of the layers of its group."""
    queues: dict[int, tuple[Group, list[SeKronSpec]]] = {}
    for group, spec in wanted:
        queues.setdefault(id(group), (group, []))[1].append(spec)
    lineups: list[dict[str, tuple[Group, SeKronSpec]]] = []
    for group, specs in queues.values():
        for place, spec in enumerate(specs):
            turn, layer = divmod(place, len(group.layers))
            if turn == len(lineups):
                lineups.append({})
            lineups[turn][group.layers[layer]] = (group, spec)
    return lineups


def digest(spec: SeKronSpec) -> int:
    """Return what a spec is called where measurements are kept."""
    return int.from_bytes(hashlib.sha256(repr(spec).encode()).digest()[:8], "big", signed=True)
