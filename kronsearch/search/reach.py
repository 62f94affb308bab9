"""How small a network can get in a search space. Ints only: no kernel is decomposed."""

from kronsearch.budget import Limits, format_count
from kronsearch.errors import BudgetError
from kronsearch.models.profile import ModelCost
from kronsearch.search.candidates import sequences
from kronsearch.search.space import SearchSpace

__all__ = ["check_reachable", "replaceable", "smallest_cost"]


def replaceable(cost: ModelCost, space: SearchSpace) -> list[str]:
    """Return the names of the layers that a search in this space may replace, in the order of execution."""
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
        assert layer.kernel_shape is not None
        assert layer.geometry is not None
        units = list(sequences(layer.kernel_shape, layer.geometry, layer.calls, space))
        macs -= layer.kernel_macs - min([layer.kernel_macs, *(unit.macs for unit in units)])
        params -= layer.kernel_params - min([layer.kernel_params, *(unit.params for unit in units)])
    return macs, params


def check_reachable(cost: ModelCost, space: SearchSpace, limits: Limits) -> None:
    """Raise `BudgetError` with the smallest costs if a bound is below what the space can reach."""
    macs, params = smallest_cost(cost, space)
    for limit, smallest, unit in ((limits.macs, macs, "MACs"), (limits.params, params, "params")):
        if limit is not None and limit < smallest:
            raise BudgetError(
                f"a budget of {format_count(limit)} {unit} can't be reached: the smallest that this model and search "
                f"space can is {smallest} {unit} ({format_count(smallest)})"
            )
