"""Candidates: all that could replace a layer, with cost and error, and which of them no other makes pointless."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kronsearch.models.profile import LayerCost
from kronsearch.search.space import SearchSpace
from kronsearch.sekron.execution import Geometry, count_macs, dense_macs
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.planning import plan_run
from kronsearch.sekron.shapes import Structure, cp_sequence, factor_pairs, holds_groups, structure_of
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tables import ErrorTable, cp_table, pair_tables

__all__ = ["Candidates", "UnitCost", "at_rank", "layer_candidates", "pareto", "sequences"]

_LARGEST_GRAM = 4096  # side of the Gram matrix of two factors: beyond, one sequence of hundreds takes minutes


@dataclass(frozen=True)
class UnitCost:
    """The cost of a sequence of factors at R_1 = 1 and other ranks 1, with the run of fewest MACs there.

    Both grow in proportion to R_1; only the MACs of a sequence whose run merges all factors are the same at any rank.
    """

    spec: SeKronSpec
    macs: int
    params: int

    def macs_at(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the MACs at each of these R_1."""
        return np.full_like(ranks, self.macs) if len(self.spec.order) == 1 else ranks * self.macs


@dataclass(frozen=True)
class Candidates:
    """The candidates of one layer, entry 0 being the dense layer itself.

    Args:
        name: dotted name of the layer.
        kernel_shape: its kernel's.
        sequences: the sequences of factors, all ranks being 1, with their runs; the last is the dense kernel's.
        sequence: (count,) index of each candidate's sequence.
        rank: (count,) R_1, other ranks are 1; 0 for the dense layer.
        macs: (count,) multiply-accumulates of the layer for one example.
        params: (count,) entries of the factors.
        error: (count,) relative squared error.
        latency: (count,) nanoseconds of the layer in its network, None where that was not measured.
    """

    name: str
    kernel_shape: tuple[int, ...]
    sequences: tuple[SeKronSpec, ...]
    sequence: NDArray[np.int64]
    rank: NDArray[np.int64]
    macs: NDArray[np.int64]
    params: NDArray[np.int64]
    error: NDArray[np.float64]
    latency: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Count the candidates, the dense layer among them."""
        return len(self.rank)

    def spec(self, index: int) -> SeKronSpec | None:
        """Return a candidate's spec, None for the dense layer."""
        if self.rank[index] == 0:
            return None
        return at_rank(self.sequences[int(self.sequence[index])], int(self.rank[index]))

    def structures(self) -> NDArray[np.object_]:
        """Return each candidate's kind of structure, (count,)."""
        kinds = np.array([unit.structure for unit in self.sequences], dtype=object)
        return kinds[self.sequence]

    def without_pointless(self) -> "Candidates":
        """Leave out what another candidate of the same structure beats or equals in both costs and in error."""
        kinds = self.structures()
        fronts = []
        for kind in dict.fromkeys(kinds):
            members = np.flatnonzero(kinds == kind)
            fronts.append(members[pareto([self.macs[members], self.params[members]], self.error[members])])
        return self.take(np.sort(np.concatenate(fronts)))

    @property
    def costs(self) -> dict[str, NDArray[np.int64]]:
        """What each candidate costs, by the names of `Limits`; the latency where it was measured."""
        costs = {"macs": self.macs, "params": self.params}
        return costs if self.latency is None else {**costs, "latency": self.latency}

    def with_latency(self, latency: NDArray[np.int64]) -> "Candidates":
        """Return the candidates with these latencies."""
        return replace(self, latency=latency)

    def take(self, chosen: NDArray[Any]) -> "Candidates":
        """Return the chosen candidates, given by index or mask."""
        columns = ("sequence", "rank", "macs", "params", "error", *(() if self.latency is None else ("latency",)))
        return replace(self, **{column: getattr(self, column)[chosen] for column in columns})


def at_rank(unit: SeKronSpec, rank: int) -> SeKronSpec:
    """Return a sequence of ranks 1 with another R_1."""
    return replace(unit, ranks=(rank, *unit.ranks[1:]))


def sequences(
    kernel_shape: tuple[int, ...], geometry: Geometry, calls: Sequence[Sequence[int]], space: SearchSpace
) -> Iterator[UnitCost]:
    """Yield the sequences of a space that save MACs or params at rank 1, with their costs. Ints only.

    Left out are those of two factors with more than 4096 entries each, and those that the layer's groups don't allow.
    """
    dense = sum(dense_macs(kernel_shape, geometry, call) for call in calls)
    deep = cp_sequence(kernel_shape)
    for shapes in (*factor_pairs(kernel_shape), *((deep,) if deep else ())):
        if not holds_groups(shapes, geometry.groups):
            continue
        if structure_of(shapes) in space.structures and min(map(prod, shapes)) <= _LARGEST_GRAM:
            spec = plan_run(SeKronSpec(shapes, (1,) * (len(shapes) - 1)), geometry, calls)
            unit = UnitCost(spec, sum(count_macs(spec, geometry, call) for call in calls), spec.params)
            if unit.macs < dense or unit.params < prod(kernel_shape):
                yield unit


def layer_candidates(
    kernel: Tensor, cost: LayerCost, space: SearchSpace, *, metric: Metric | None = None
) -> Candidates:
    """Return all candidates of a layer that save MACs or params, with errors in the metric's norm.

    Args:
        kernel: of a replaceable layer, (out channels, in channels, *extent).
        cost: the layer's profile; all its calls count.
        space: which sequences to look at.
        metric: of the layer, plain when None.
    """
    kernel, shape, dense = kernel.detach(), tuple(kernel.shape), cost.kernel_macs
    assert cost.geometry is not None
    units = list(sequences(shape, cost.geometry, cost.calls, space))
    found = list(zip(units, _tables(kernel, units, dense, space, metric), strict=True))
    specs = (*(unit.spec for unit, _ in found), SeKronSpec((shape,)))
    sequence = [np.full(len(table.ranks), i) for i, (_, table) in enumerate(found)]
    rank = [table.ranks[:, 0] for _, table in found]
    macs = [unit.macs_at(table.ranks[:, 0]) for unit, table in found]
    params = [table.ranks[:, 0] * unit.params for unit, table in found]
    error = [table.errors for _, table in found]
    everything = Candidates(
        cost.name,
        shape,
        specs,
        np.concatenate([[len(found)], *sequence]).astype(np.int64),
        np.concatenate([[0], *rank]).astype(np.int64),
        np.concatenate([[dense], *macs]).astype(np.int64),
        np.concatenate([[kernel.numel()], *params]).astype(np.int64),
        np.concatenate([[0.0], *error]),
    )
    saves = (everything.macs < dense) | (everything.params < kernel.numel())
    saves[0] = True
    return everything.take(saves)


def _tables(
    kernel: Tensor, units: Sequence[UnitCost], dense: int, space: SearchSpace, metric: Metric | None
) -> Iterator[ErrorTable]:
    """Yield the table of each sequence, up to the rank at which it saves neither MACs nor params."""
    sequences = [unit.spec.factor_shapes for unit in units]
    pairs = iter(pair_tables(kernel, [shapes for shapes in sequences if len(shapes) == 2], metric=metric))
    for unit, shapes in zip(units, sequences, strict=True):
        highest = max((dense - 1) // unit.macs, (kernel.numel() - 1) // unit.params)
        if unit.spec.structure is Structure.DEEP:
            with torch.no_grad():
                yield cp_table(kernel, shapes, highest, fits=space.deep_fits, metric=metric)
        else:
            table = next(pairs)
            yield ErrorTable(shapes, table.ranks[:highest], table.errors[:highest])


def pareto(costs: Sequence[NDArray[Any]], error: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return, ascending, the indices of the entries that no other entry beats or equals in every cost and in error.

    Of equal entries the first stays.
    """
    keys = np.stack([*costs, error]).astype(np.float64)
    order = np.lexsort(keys[::-1])
    kept: list[int] = []
    fence = np.empty((len(keys) - 1, len(order)))
    for index in order:
        rest = keys[1:, index]
        if not (fence[:, : len(kept)] <= rest[:, None]).all(axis=0).any():
            fence[:, len(kept)] = rest
            kept.append(int(index))
    return np.sort(np.array(kept, dtype=np.int64))
