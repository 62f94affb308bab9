import pytest

from kronsearch.budget import Limits
from kronsearch.errors import BudgetError
from kronsearch.search.allocate import Choices, allocate
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.reach import check_reachable, replaceable, smallest_cost
from kronsearch.search.space import SearchSpace

SPACE = SearchSpace(deep_fits=3)


def test_the_smallest_cost_is_reached_by_the_allocation_and_one_less_is_not(digits_model, digits_cost):
    macs, params = smallest_cost(digits_cost, SPACE)
    layers = []
    for name in replaceable(digits_cost, SPACE):
        table = layer_candidates(digits_model.get_parameter(f"{name}.weight"), digits_cost.layer(name), SPACE)
        layers.append(Choices(table.costs, table.error))
    whole = {"macs": digits_cost.macs, "params": digits_cost.params}
    fixed = {name: cost - sum(int(layer.costs[name][0]) for layer in layers) for name, cost in whole.items()}
    assert macs < digits_cost.macs
    assert params < digits_cost.params

    assert allocate(layers, Limits(macs, None), fixed=fixed).costs["macs"] == macs
    for name, least in (("macs", macs), ("params", params)):
        assert sum(int(layer.costs[name].min()) for layer in layers) + fixed[name] == least
    check_reachable(digits_cost, SPACE, Limits(macs, None))
    check_reachable(digits_cost, SPACE, Limits(None, params))
    with pytest.raises(BudgetError, match="each by itself"):
        check_reachable(digits_cost, SPACE, Limits(macs, params))
    with pytest.raises(BudgetError, match=f"the smallest that this model and search space can is {macs} MACs"):
        check_reachable(digits_cost, SPACE, Limits(macs - 1, None))
    with pytest.raises(BudgetError, match=f"is {params} params"):
        check_reachable(digits_cost, SPACE, Limits(None, params - 1))


def test_layers_that_the_space_keeps_dense_are_not_replaceable(digits_cost):
    everything = replaceable(digits_cost, SPACE)
    assert everything
    assert replaceable(digits_cost, SearchSpace(keep_dense=(everything[0],))) == everything[1:]
    assert smallest_cost(digits_cost, SearchSpace(keep_dense=("*",))) == (digits_cost.macs, digits_cost.params)
    check_reachable(digits_cost, SearchSpace(keep_dense=("*",)), Limits(digits_cost.macs, digits_cost.params))
