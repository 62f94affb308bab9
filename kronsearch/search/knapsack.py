"""The multiple-choice knapsack: one item of each group, the lowest error under all limits, by integer programming.

What can't be part of any choice under the limits is left out first, in whole numbers. The linear relaxation comes next.
Its prices of the limits give every item an excess: by how much the error would lie above the relaxation's, at least, if
it were chosen (Lagrangian duality; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Only items of
little excess are left to the integer program, which is small then, and what it finds proves for how much excess the
others need not be looked at.

HiGHS computes to absolute tolerances. So errors are given to it in units of what is being minimised, its bound counts
for less by its tolerance, and choices that overstep a limit by a little are cut off. Its presolve is left out: where
costs of one limit lie decades apart, it loses choices.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array, hstack

from kronsearch.errors import BudgetError
from kronsearch.search.candidates import pareto

__all__ = ["Knapsack"]

_GAP = 1e-4
_SECONDS = 20.0
_INFEASIBLE = 2  # SciPy's status
_FIRST = 8  # items of each group, on average, that are tried first
_HIGHEST = 1e6  # price of a limit: a unit of error for a millionth of what it leaves
_UNITS = 100.0  # what is minimised, as HiGHS sees it
_TOLERANCE = 1e-6  # of HiGHS, absolute
_CUTS = 8  # choices that overstep a limit by less than HiGHS sees, before it is told to stay below the limit


@dataclass(frozen=True)
class _Items:
    """What is chosen from: errors (count,) from 0, owner (count,) ascending, costs (limits, count), limits."""

    errors: NDArray[np.float64]
    owner: NDArray[np.int64]
    costs: NDArray[np.int64]
    limits: NDArray[np.int64]


class Knapsack(_Items):
    """One item of each group is to be taken."""

    def solve(self) -> tuple[NDArray[np.int64], float] | None:
        """Return the items of a choice, ascending, and a proven bound on the error of any; None if there is none.

        The error of the choice is within 1e-4 of the bound, or as near as 20 seconds give.

        Raises:
            BudgetError: no choice was found in time, though there may be one.
        """
        kept = self._fitting()
        if kept is None:
            return None
        found = _Program(self.errors[kept], self.owner[kept], *self._above_least(kept)).solve()
        if found is None:
            return None
        chosen, bound, unit = kept[found[0]], found[1], found[2]
        error = float(self.errors[chosen].sum())
        if error - bound > _GAP * error and error < unit / 10:  # less than HiGHS can see in these units
            lower = np.flatnonzero(self.errors <= error)  # all that a better choice can have
            better = Knapsack(self.errors[lower], self.owner[lower], self.costs[:, lower], self.limits).solve()
            if better is not None and self.errors[lower[better[0]]].sum() <= error:
                return lower[better[0]], max(bound, better[1])
        return chosen, bound

    def _fitting(self) -> NDArray[np.int64] | None:
        """Return the items that fit with the least of all other groups; None if no choice is left."""
        kept = np.arange(len(self.errors))
        groups = self.owner[-1] + 1
        while len(np.unique(self.owner[kept])) == groups:
            above, room = self._above_least(kept, binding=False)
            if (room < 0).any():
                return None
            fits = (above <= room[:, None]).all(0)
            if fits.all():
                return kept
            kept = kept[fits]
        return None

    def _above_least(
        self, kept: NDArray[np.int64], *, binding: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the costs of items beyond the least of their group, and what that leaves of each limit.

        If binding, of those limits only that some choice oversteps.
        """
        costs, owner = self.costs[:, kept], self.owner[kept]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        least = np.minimum.reduceat(costs, starts, axis=1)
        above, room = costs - least[:, owner], self.limits - least.sum(1)
        rows = np.flatnonzero(np.maximum.reduceat(above, starts, axis=1).sum(1) > room) if binding else slice(None)
        return above[rows], room[rows]


class _Program(_Items):
    """A knapsack in which every item fits, some choice oversteps each limit, and each group's least cost is 0."""

    def solve(self) -> tuple[NDArray[np.int64], float, float] | None:
        """Return a choice, a bound on the error of any, and the unit in which HiGHS saw them; None if there is none.

        Raises:
            BudgetError: no choice was found in time, though there may be one.
        """
        if not len(self.limits):
            lowest = self._least(self.errors)
            return lowest, float(self.errors[lowest].sum()), 1.0
        excess, floor = self._excesses()
        unit = float(np.clip(floor, 1e-3 * self._largest, self._largest))
        first = min(len(excess), _FIRST * self._groups) - 1
        reach = float(np.partition(excess, first)[first])
        while True:
            inside = np.flatnonzero(excess <= reach)
            everything = len(inside) == len(excess)
            inside = self._unbeaten(inside)
            result = self._choose(inside, unit / _UNITS)
            if result.x is None and not everything:
                reach = 4 * reach if reach > 0 else float(excess.max())
                continue
            chosen: NDArray[np.int64] | None = self._cheap() if result.x is None else inside[result.x > 0.5]
            if chosen is None and result.status == _INFEASIBLE:
                return None
            if chosen is None:
                raise BudgetError("no plan within the budget was found: ask for a looser one")
            error = float(self.errors[chosen].sum())
            proven = -np.inf if result.x is None else float(result.mip_dual_bound) - _TOLERANCE * self._groups
            bound = max(0.0, floor, min(proven * unit / _UNITS, np.inf if everything else floor + reach))
            if everything or error - bound <= _GAP * error or reach >= error - floor:
                return chosen, bound, unit
            reach = error - floor  # what lies beyond can't be part of a better choice

    @property
    def _groups(self) -> int:
        return int(self.owner[-1]) + 1

    @cached_property
    def _largest(self) -> float:
        return float(self.errors.max()) or 1.0

    @cached_property
    def _rows(self) -> NDArray[np.float64]:
        """The costs as parts of their limits."""
        rows: NDArray[np.float64] = self.costs / np.maximum(self.limits, 1)[:, None]
        return rows

    def _excesses(self) -> tuple[NDArray[np.float64], float]:
        """Return every item's excess and the error of the relaxation.

        The relaxation is solved by column generation: on few items, to which those are added that its prices make
        the best of their group, until they are in it already. Any prices give excesses and a floor that hold, so
        nothing hangs on how far it gets, or on overstepping a limit for a high price.
        """
        limits, errors = len(self.limits), self.errors / self._largest
        inside = np.unique([self._least(values) for values in (errors, *self._rows)])
        while True:
            relaxed = linprog(
                np.concatenate([errors[inside], np.full(limits, _HIGHEST)]),
                A_ub=np.hstack([self._rows[:, inside], -np.eye(limits)]),
                b_ub=np.ones(limits),
                A_eq=hstack([self._one_each(inside), csr_array((self._groups, limits))]),
                b_eq=np.ones(self._groups),
            )
            prices = np.maximum(0.0, -relaxed.ineqlin.marginals) * self._largest
            priced = self.errors + prices @ self._rows
            best = self._least(priced)
            if np.isin(best, inside).all():
                return priced - priced[best][self.owner], float(priced[best].sum() - prices.sum())
            inside = np.union1d(inside, best)

    def _least(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the index of each group's item of the least value, of several the one that costs least."""
        return np.lexsort((self._rows.sum(0), values, self.owner))[np.flatnonzero(np.diff(self.owner, prepend=-1))]

    def _cheap(self) -> NDArray[np.int64] | None:
        """Return the choice of least error among those that are least in one cost or in all, if one is allowed."""
        choices = [self._least(values) for values in (*self._rows, self._rows.sum(0))]
        return min(
            (chosen for chosen in choices if not self._overstepped(chosen).any()),
            key=lambda chosen: float(self.errors[chosen].sum()),
            default=None,
        )

    def _overstepped(self, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which limits a choice oversteps."""
        over: NDArray[np.bool_] = self.costs[:, chosen].sum(1) > self.limits
        return over

    def _unbeaten(self, inside: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out what another item of the group beats; that has less excess, so it is among them."""
        of_groups = np.split(inside, np.flatnonzero(np.diff(self.owner[inside])) + 1)
        return np.concatenate([part[pareto([*self.costs[:, part]], self.errors[part])] for part in of_groups])

    def _choose(self, inside: NDArray[np.int64], unit: float) -> OptimizeResult:
        """Solve the integer program on some items, errors in these units; its bound is that without slack.

        HiGHS takes what oversteps a limit by a little. Such a choice is cut off; after some of them, it is to stay so
        much below the limits that it can't.
        """
        each = LinearConstraint(self._one_each(inside), 1, 1)
        cuts: list[LinearConstraint] = []
        bound = 0.0
        for slack in (*[0.0] * _CUTS, 2 * _TOLERANCE):
            result = milp(
                self.errors[inside] / unit,
                constraints=[each, LinearConstraint(self._rows[:, inside], -np.inf, 1 - slack), *cuts],
                integrality=np.ones(len(inside)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.9 * _GAP, "time_limit": _SECONDS, "presolve": False},
            )
            if slack == 0 and result.mip_dual_bound is not None:
                bound = max(bound, result.mip_dual_bound)
            if result.x is None:
                result.status = result.status if slack == 0 else None  # there may be one between the two limits
                break
            over = np.flatnonzero(self._overstepped(inside[result.x > 0.5]))
            if not len(over):
                break
            cuts.append(self._cut(inside, result.x > 0.5, over[0]))
        result.mip_dual_bound = bound
        return result

    def _cut(self, inside: NDArray[np.int64], taken: NDArray[np.bool_], limit: np.intp) -> LinearConstraint:
        """Return what forbids some of the taken items that overstep a limit, all at once, and what costs no less."""
        costs, owner = self.costs[limit, inside], self.owner[inside]
        dearest = np.flatnonzero(taken)[np.argsort(-costs[taken])]
        needed = int(np.argmax(np.cumsum(costs[dearest]) > self.limits[limit])) + 1
        cheapest = np.full(self._groups, np.inf)
        cheapest[owner[dearest[:needed]]] = costs[dearest[:needed]]
        return LinearConstraint((costs >= cheapest[owner]).astype(float), -np.inf, needed - 1)

    def _one_each(self, inside: NDArray[np.int64]) -> csr_array:
        """Return the matrix that counts the items taken of each group."""
        return csr_array((np.ones(len(inside)), (self.owner[inside], np.arange(len(inside)))))
