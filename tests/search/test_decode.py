import math
from dataclasses import replace

import pytest

from kronsearch.budget import Limits
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.reach import replaceable
from kronsearch.search.space import SearchSpace
from kronsearch.sekron import Structure

SPACE = SearchSpace(deep_fits=3)


@pytest.fixture(scope="module")
def problem(digits_model, digits_cost):
    names = replaceable(digits_cost, SPACE)
    tables = [
        layer_candidates(digits_model.get_parameter(f"{name}.weight"), digits_cost.layer(name), SPACE) for name in names
    ]
    sensitivity = {name: 1.0 + place for place, name in enumerate(names)}
    return Problem(digits_cost, Limits(digits_cost.macs // 2, None), tables, sensitivity)


def errors(problem, allocation):
    return {
        layer.name: float(layer.error[index])
        for layer, index in zip(problem.candidates, allocation.chosen, strict=True)
    }


def test_any_weighing_keeps_the_budget(problem):
    for importance in (-3.0, 0.0, 3.0):
        weighing = Weighing(
            trust=0.3, curvature=0.7, importance={problem.groups[0]: importance}, price={Structure.DEEP: importance}
        )
        assert problem.allocate(weighing).costs["macs"] <= problem.limits.macs


def test_the_plain_weighing_with_full_trust_has_the_lowest_predicted_error(problem):
    plain = problem.predicted_error(problem.allocate(Weighing(trust=1.0)).chosen)
    for weighing in (Weighing(trust=0.0), Weighing(trust=1.0, curvature=0.6), Weighing(trust=1.0, price={"deep": 2.0})):
        assert plain <= problem.predicted_error(problem.allocate(weighing).chosen) * (1 + 1e-3)


def test_importance_buys_a_group_accuracy(problem):
    group = problem.groups[0]
    members = [layer.name for layer in problem.candidates if layer.name in _members(problem, group)]
    before = errors(problem, problem.allocate(Weighing()))
    after = errors(problem, problem.allocate(Weighing(importance={group: 3.0})))
    assert sum(after[name] for name in members) < sum(before[name] for name in members)


def test_context_counts_as_far_as_it_is_trusted(problem):
    layer = problem.candidates[2]
    name = layer.name
    known = replace(problem, context={name: 3.0})
    assert known.allocate(Weighing()) == problem.allocate(Weighing())
    half = known.weighed(layer, Weighing(context=0.5))
    assert half == pytest.approx(math.exp(1.5) * problem.weighed(layer, Weighing()))
    before, after = (errors(each, each.allocate(Weighing(context=1.0))) for each in (problem, known))
    assert after[name] < before[name]


def _members(problem, group):
    from kronsearch.search.decode import group_of

    return {layer.name for layer in problem.candidates if group_of(problem.cost.layer(layer.name)) == group}


def test_a_price_drives_a_structure_out(problem):
    kinds = {
        kind
        for layer, index in zip(
            problem.candidates, problem.allocate(Weighing(price={Structure.DEEP: math.log(1e9)})).chosen, strict=True
        )
        for kind in [layer.structures()[index]]
        if layer.error[index] > 1e-6
    }
    assert Structure.DEEP not in kinds
