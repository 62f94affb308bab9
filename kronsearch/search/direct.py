"""Plans chosen layer by layer: each layer's place on its front is a number, and nothing makes them keep a budget."""

from collections.abc import Mapping
from math import log

import numpy as np
from numpy.typing import NDArray

from kronsearch.search.allocate import Allocation
from kronsearch.search.candidates import Candidates, pareto
from kronsearch.search.decode import Problem

__all__ = ["excess", "front", "place", "places"]

_ROUNDING = 1 + 1e-9  # of a cost: a candidate's own place leads back to it


def front(problem: Problem, layer: Candidates) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return a layer's candidates that no other one beats, those that cost most first, and what they cost, (count,).

    The cost is the sum of the parts that they take of the bounds which were asked for. Beaten is what is no better in
    any of these and in error: what the allocation chooses is not, so that its plans have their places, though under two
    bounds the error is not in the order of the cost then. None has what costs more than the dense layer in anything,
    and of equal sums what has not the least error.
    """
    cost, bounded = _cost(problem, layer), [layer.costs[name] for name in problem.limits.given]
    kept = np.flatnonzero(np.all([layer.costs[name] <= layer.costs[name][0] for name in problem.bounds.given], axis=0))
    kept = kept[pareto([each[kept] for each in bounded], layer.error[kept])]
    kept = kept[np.lexsort((-layer.error[kept], -cost[kept]))]
    kept = kept[np.diff(cost[kept], append=-np.inf) < 0]
    return kept, cost[kept]


def _cost(problem: Problem, layer: Candidates) -> NDArray[np.float64]:
    costs = sum(layer.costs[name] / max(limit, 1) for name, limit in problem.limits.given.items())
    return np.asarray(costs, dtype=float)


def place(problem: Problem, places: Mapping[str, float]) -> Allocation:
    """Return the candidates at these places, from 0 for the most expensive one of a front to 1 for the cheapest.

    Between them it is the logarithm of the cost that a place divides, as ranks are spread over orders of magnitude. It
    is no allocation that keeps the budgets, see `excess`; its gap is 1, for nothing is proven.
    """
    chosen = []
    for layer in problem.candidates:
        kept, cost = front(problem, layer)
        wanted = cost[0] * (cost[-1] / cost[0]) ** places[layer.name] * _ROUNDING
        chosen.append(int(kept[np.argmax(cost <= wanted)]))
    picked = list(zip(problem.candidates, chosen, strict=True))
    costs = {
        name: whole + sum(int(layer.costs[name][index] - layer.costs[name][0]) for layer, index in picked)
        for name, whole in problem.dense.items()
    }
    error = sum(problem.sensitivity[layer.name] * float(layer.error[index]) for layer, index in picked)
    return Allocation(tuple(chosen), costs, error, gap=1.0)


def places(problem: Problem, allocation: Allocation) -> dict[str, float]:
    """Return the places of an allocation's candidates; of one that has none, that of the next of less cost."""
    found = {}
    for layer, index in zip(problem.candidates, allocation.chosen, strict=True):
        _, cost = front(problem, layer)
        own = _cost(problem, layer)[index]
        span = log(cost[0] / cost[-1])
        found[layer.name] = float(np.clip(log(cost[0] / own) / span, 0, 1)) if span > 0 else 0.0
    return found


def excess(problem: Problem, allocation: Allocation) -> dict[str, float]:
    """Return by which part of each bound an allocation is above it, below zero where it keeps it."""
    return {name: allocation.costs[name] / max(limit, 1) - 1 for name, limit in problem.bounds.given.items()}
