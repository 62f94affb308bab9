"""Allocation: one candidate for each layer, the lowest predicted error under the budgets, by integer programming.

The linear relaxation comes first. Its prices of the budgets give every candidate an excess: by how much the error would
lie above the relaxation's, at least, if it were chosen (Lagrangian duality; Kellerer, Pferschy and Pisinger, Knapsack
Problems, 2004, chapter 11). Only candidates of little excess are left to the integer program, which is small then, and
what it finds proves for how much excess the others need not be looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array, hstack

from kronsearch.budget import Limits, format_cost
from kronsearch.errors import BudgetError
from kronsearch.search.candidates import pareto

__all__ = ["Allocation", "Choices", "allocate"]

_GAP = 1e-4
_SECONDS = 20.0
_LIMIT, _INFEASIBLE = 1, 2  # SciPy's status
_FIRST = 8  # candidates for each layer, on average, that are tried first
_HIGHEST = 1e6  # price of a budget: the largest predicted error for a millionth of it
_SLACK = 2e-6  # of a budget, where HiGHS oversteps it (it may, by 1e-6): budgets are kept to the last MAC


@dataclass(frozen=True)
class Choices:
    """What can be chosen for one layer: costs, by the names of `Limits`, and a predicted error, (count,) each."""

    costs: Mapping[str, NDArray[np.int64]]
    error: NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """One candidate for each layer.

    Args:
        chosen: index of the candidate for each layer.
        costs: of the chosen candidates together, fixed costs included, by name.
        error: predicted, the sum over the layers.
        gap: proven: no choice under the budgets has an error below `error · (1 - gap)`.
    """

    chosen: tuple[int, ...]
    costs: Mapping[str, int]
    error: float
    gap: float


def allocate(layers: Sequence[Choices], limits: Limits, *, fixed: Mapping[str, int] | None = None) -> Allocation:
    """Choose one candidate for each layer so that the sum of errors is lowest under all budgets.

    A multiple-choice knapsack, solved by HiGHS to a proven gap of 1e-4 (or what 20 seconds give).

    Args:
        layers: the candidates; all of them have the same costs, those that are bounded among them.
        limits: bounds on the whole network.
        fixed: costs of all that is not chosen here, by name; nothing where a name is missing.

    Raises:
        BudgetError: no choice keeps the budgets; it names the smallest costs that can be reached.
    """
    fixed = fixed or {}
    bounds = {name: limit - fixed.get(name, 0) for name, limit in limits.given.items()}
    counts = [len(layer.error) for layer in layers]
    owner = np.repeat(np.arange(len(layers)), counts)
    errors = np.concatenate([layer.error for layer in layers])
    scale = float(errors.max()) or 1.0
    costs = np.array([np.concatenate([layer.costs[name] for layer in layers]) for name in bounds])
    costs = costs.reshape(len(bounds), len(errors))
    if any(limit < _least(layers, name) for name, limit in bounds.items()):
        raise BudgetError(_unreachable(layers, limits, fixed))
    problem = _Program(errors / scale, owner, costs, np.array([*bounds.values()]))
    found = problem.solve()
    if found is None:
        raise BudgetError(_unreachable(layers, limits, fixed))
    taken, bound = found
    starts = np.cumsum([0, *counts[:-1]])
    chosen = tuple(int(np.argmax(taken[start : start + count])) for start, count in zip(starts, counts, strict=True))
    picked = list(zip(layers, chosen, strict=True))
    total = {
        name: fixed.get(name, 0) + sum(int(layer.costs[name][index]) for layer, index in picked)
        for name in layers[0].costs
    }
    if not limits.hold(**total):
        raise AssertionError(f"the solver overstepped a budget: {total}, {limits}")
    error = sum(float(layer.error[index]) for layer, index in picked)
    gap = max(0.0, (error - max(0.0, bound) * scale) / error) if error > 0 else 0.0
    return Allocation(chosen, total, error, gap)


@dataclass(frozen=True)
class _Program:
    """One candidate for each layer: errors (count,), owner (count,) ascending, costs (budgets, count), limits."""

    errors: NDArray[np.float64]
    owner: NDArray[np.int64]
    costs: NDArray[np.int64]
    limits: NDArray[np.int64]

    def solve(self) -> tuple[NDArray[np.bool_], float] | None:
        """Return which candidates are taken and a proven bound on the error of any choice; None if there is none.

        Raises:
            BudgetError: no choice was found in time, though there may be one.
        """
        excess, floor = self._excesses()
        first = min(len(excess), _FIRST * (int(self.owner[-1]) + 1)) - 1
        reach = float(np.partition(excess, first)[first])
        while True:
            inside = np.flatnonzero(excess <= reach)
            everything = len(inside) == len(excess)
            inside = self._unbeaten(inside)
            result = self._choose(inside)
            if result.x is None:
                if everything and result.status == _INFEASIBLE:
                    return None
                if everything:
                    raise BudgetError("no plan within the budget was found: ask for a looser one")
                reach = 4 * reach if reach > 0 else float(excess.max())
                continue
            taken = np.zeros(len(excess), dtype=bool)
            taken[inside[result.x > 0.5]] = True
            error = float(self.errors[taken].sum())
            bound = float(result.mip_dual_bound or 0.0)
            if everything:
                return taken, bound
            if error - min(bound, floor + reach) <= _GAP * error or reach >= error - floor:
                return taken, min(bound, floor + reach)
            reach = error - floor  # what lies beyond can't be part of a better choice

    def _excesses(self) -> tuple[NDArray[np.float64], float]:
        """Return every candidate's excess and the error of the relaxation.

        The relaxation is solved by column generation: on few candidates, to which those are added that its prices make
        the best of their layer, until they are in it already. Any prices give excesses and a floor that hold, so
        nothing hangs on how far it gets, or on overstepping a budget for a high price.
        """
        layers, budgets = int(self.owner[-1]) + 1, len(self.limits)
        inside = np.unique([self._least(values) for values in (self.errors, *self._rows)])
        while True:
            relaxed = linprog(
                np.concatenate([self.errors[inside], np.full(budgets, _HIGHEST)]),
                A_ub=np.hstack([self._rows[:, inside], -np.eye(budgets)]),
                b_ub=np.ones(budgets),
                A_eq=hstack([self._one_each(self.owner[inside]), csr_array((layers, budgets))]),
                b_eq=np.ones(layers),
            )
            prices = np.maximum(0.0, -relaxed.ineqlin.marginals)
            priced = self.errors + prices @ self._rows
            best = self._least(priced)
            if np.isin(best, inside).all():
                return priced - priced[best][self.owner], float(priced[best].sum() - prices.sum())
            inside = np.union1d(inside, best)

    def _least(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the index of each layer's candidate of the least value."""
        return np.lexsort((values, self.owner))[np.flatnonzero(np.diff(self.owner, prepend=-1))]

    def _unbeaten(self, inside: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out what another candidate of the layer beats; that has less excess, so it is among them."""
        of_layers = np.split(inside, np.flatnonzero(np.diff(self.owner[inside])) + 1)
        return np.concatenate([part[pareto([*self.costs[:, part]], self.errors[part])] for part in of_layers])

    def _choose(self, inside: NDArray[np.int64]) -> OptimizeResult:
        """Solve the integer program on some candidates; the bound that it proves is that without slack."""
        rows = self._rows[:, inside]
        bound = None
        for slack in (0.0, _SLACK):
            result = milp(
                self.errors[inside],
                constraints=[
                    LinearConstraint(self._one_each(self.owner[inside]), 1, 1),
                    LinearConstraint(rows, -np.inf, 1 - slack),
                ],
                integrality=np.ones(len(inside)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
            )
            bound = result.mip_dual_bound if bound is None else bound
            if result.x is None and slack > 0:
                result.status = _LIMIT  # there may be one between the two bounds
            if result.x is None or (self.costs[:, inside][:, result.x > 0.5].sum(1) <= self.limits).all():
                break
        result.mip_dual_bound = bound
        return result

    @cached_property
    def _rows(self) -> NDArray[np.float64]:
        """The costs as parts of their limits."""
        rows: NDArray[np.float64] = self.costs / np.maximum(self.limits, 1)[:, None]
        return rows

    @staticmethod
    def _one_each(owner: NDArray[np.int64]) -> csr_array:
        """Return the matrix that counts the candidates taken for each layer."""
        return csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))


def _least(layers: Sequence[Choices], name: str) -> int:
    """Return the least that a cost can be brought down to by itself."""
    return sum(int(layer.costs[name].min()) for layer in layers)


def _unreachable(layers: Sequence[Choices], limits: Limits, fixed: Mapping[str, int]) -> str:
    least = {name: fixed.get(name, 0) + _least(layers, name) for name in limits.given}
    blamed = [name for name, limit in limits.given.items() if limit < least[name]] or [*limits.given]
    asked = [format_cost(name, limits.given[name]) for name in blamed]
    smallest = [format_cost(name, least[name], exact=True) for name in blamed]
    if len(blamed) == 1:
        return f"a budget of {asked[0]} can't be reached: the smallest that can is {smallest[0]}"
    return (
        f"a budget of {' and '.join(asked)} can't be reached: the smallest that can, each by itself, "
        f"is {' and '.join(smallest)}"
    )
