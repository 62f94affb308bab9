"""Allocation: one candidate for each layer, the lowest predicted error under the budgets, by integer programming."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from kronsearch.budget import Limits, format_count
from kronsearch.errors import BudgetError
from kronsearch.search.candidates import pareto

__all__ = ["Allocation", "Choices", "allocate"]

_GAP = 1e-4
_SECONDS = 20.0
_INFEASIBLE = 2  # SciPy's status
_SLACK = 2e-6  # of a budget, where HiGHS oversteps it (it may, by 1e-6): budgets are kept to the last MAC


@dataclass(frozen=True)
class Choices:
    """What can be chosen for one layer: costs and a predicted error for each candidate, (count,) each."""

    macs: NDArray[np.int64]
    params: NDArray[np.int64]
    error: NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """One candidate for each layer.

    Args:
        chosen: index of the candidate for each layer.
        macs: of the chosen candidates together, fixed costs included.
        params: likewise.
        error: predicted, the sum over the layers.
        gap: proven: no choice under the budgets has an error below `error · (1 - gap)`.
    """

    chosen: tuple[int, ...]
    macs: int
    params: int
    error: float
    gap: float


def allocate(layers: Sequence[Choices], limits: Limits, *, fixed_macs: int = 0, fixed_params: int = 0) -> Allocation:
    """Choose one candidate for each layer so that the sum of errors is lowest under all budgets.

    A multiple-choice knapsack, solved by HiGHS to a proven gap of 1e-4 (or what 20 seconds give).

    Args:
        layers: the candidates; those that others make pointless are left out here.
        limits: bounds on the whole network.
        fixed_macs: of all that is not chosen here.
        fixed_params: likewise.

    Raises:
        BudgetError: no choice keeps the budgets; it names the smallest costs that can be reached.
    """
    bounds = [
        (limit - fixed, name)
        for limit, fixed, name in ((limits.macs, fixed_macs, "macs"), (limits.params, fixed_params, "params"))
        if limit is not None
    ]
    kept = [pareto([getattr(layer, name) for _, name in bounds], layer.error) for layer in layers]
    counts = [len(indices) for indices in kept]
    owner = np.repeat(np.arange(len(layers)), counts)
    errors = np.concatenate([layer.error[indices] for layer, indices in zip(layers, kept, strict=True)])
    scale = float(errors.max()) or 1.0
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(layers), len(owner)))
    rows = [
        (np.concatenate([getattr(layer, name)[indices] for layer, indices in zip(layers, kept, strict=True)]), limit)
        for limit, name in bounds
    ]
    for slack in (0.0, _SLACK):
        result = milp(
            errors / scale,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                *(LinearConstraint(costs[None] / max(limit, 1), -np.inf, 1 - slack) for costs, limit in rows),
            ],
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
        if result.x is None and result.status == _INFEASIBLE:
            raise BudgetError(_unreachable(layers, limits, fixed_macs, fixed_params))
        if result.x is None:
            raise BudgetError(f"no plan within the budget was found in {_SECONDS:.0f} s: ask for a looser budget")
        taken = result.x > 0.5
        if all(int(costs[taken].sum()) <= limit for costs, limit in rows):
            break
    starts = np.cumsum([0, *counts[:-1]])
    chosen = tuple(
        int(indices[np.argmax(result.x[start : start + count])])
        for indices, start, count in zip(kept, starts, counts, strict=True)
    )
    picked = list(zip(layers, chosen, strict=True))
    macs = fixed_macs + sum(int(layer.macs[index]) for layer, index in picked)
    params = fixed_params + sum(int(layer.params[index]) for layer, index in picked)
    if (limits.macs is not None and macs > limits.macs) or (limits.params is not None and params > limits.params):
        raise AssertionError(f"the solver overstepped a budget: {macs} MACs, {params} params, {limits}")
    error = sum(float(layer.error[index]) for layer, index in picked)
    bound = max(0.0, float(result.mip_dual_bound or 0.0)) * scale
    return Allocation(chosen, macs, params, error, max(0.0, (error - bound) / error) if error > 0 else 0.0)


def _unreachable(layers: Sequence[Choices], limits: Limits, fixed_macs: int, fixed_params: int) -> str:
    asked, smallest = [], []
    for limit, name, fixed, unit in (
        (limits.macs, "macs", fixed_macs, "MACs"),
        (limits.params, "params", fixed_params, "params"),
    ):
        if limit is not None:
            least = fixed + sum(int(getattr(layer, name).min()) for layer in layers)
            asked.append(f"{format_count(limit)} {unit}")
            smallest.append(f"{least} {unit}")
    return (
        f"a budget of {' and '.join(asked)} can't be reached: the smallest that can, each by itself, "
        f"is {' and '.join(smallest)}"
    )
