"""How small a network can get in a search space. Ints only: no kernel is decomposed."""

from dataclasses import replace

import numpy as np

from kronsearch.budget import Limits, format_count
from kronsearch.errors import BudgetError
from kronsearch.models.profile import ModelCost
from kronsearch.search.allocate import Choices, allocate
from kronsearch.search.candidates import UnitCost, sequences
from kronsearch.search.space import SearchSpace

__all__ = ["check_reachable", "replaceable", "smallest_cost"]


def replaceable(cost: ModelCost, space: SearchSpace) -> list[str]:
    """Return the names of the layers that a search in this space may replace, in the order of execution.

    Raises SpaceError if the space keeps layers dense that there are not.
    """
    space.check_names(layer.name for layer in cost.layers)
    return [
        layer.name
        for layer in cost.layers
        if layer.keeps_dense is None and layer.kernel_shape is not None and space.reason_to_keep(layer.name) is None
    ]


def smallest_cost(cost: ModelCost, space: SearchSpace) -> tuple[int, int]:
    """Return the fewest MACs and, by itself, the fewest parameters that a network can be brought down to."""
    macs, params = cost.macs, cost.params
    for name in replaceable(cost, space):
        layer = cost.layer(name)
        units = _units(cost, space, name)
        macs -= layer.kernel_macs - min([layer.kernel_macs, *(unit.macs for unit in units)])
        params -= layer.kernel_params - min([layer.kernel_params, *(unit.params for unit in units)])
    return macs, params


def check_reachable(cost: ModelCost, space: SearchSpace, limits: Limits) -> None:
    """Raise `BudgetError` with the smallest costs if MACs or params, or both together, can't be brought so low."""
    macs, params = smallest_cost(cost, space)
    for limit, smallest, unit in ((limits.macs, macs, "MACs"), (limits.params, params, "params")):
        if limit is not None and limit < smallest:
            raise BudgetError(
                f"a budget of {format_count(limit)} {unit} can't be reached: the smallest that this model and search "
                f"space can is {smallest} {unit} ({format_count(smallest)})"
            )
    if limits.macs is not None and limits.params is not None:
        layers = []
        for name in replaceable(cost, space):
            dense = (cost.layer(name).kernel_macs, cost.layer(name).kernel_params)
            costs = np.array([dense, *((unit.macs, unit.params) for unit in _units(cost, space, name))])
            layers.append(Choices({"macs": costs[:, 0], "params": costs[:, 1]}, np.zeros(len(costs))))
        whole = {"macs": cost.macs, "params": cost.params}
        fixed = {name: total - sum(int(layer.costs[name][0]) for layer in layers) for name, total in whole.items()}
        allocate(layers, replace(limits, latency=None), fixed=fixed)


def _units(cost: ModelCost, space: SearchSpace, name: str) -> list[UnitCost]:
    layer = cost.layer(name)
    assert layer.kernel_shape is not None
    assert layer.geometry is not None
    return list(sequences(layer.kernel_shape, layer.geometry, layer.calls, space))
