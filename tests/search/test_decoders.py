import math
from dataclasses import replace

import numpy as np
import optuna
import pytest

from kronsearch.budget import Budget, Limits
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.decoders import Allocate, Direct, new_decoder
from kronsearch.search.direct import excess, front, place, places
from kronsearch.search.pace import Pace


@pytest.fixture(scope="module")
def problem(digits_tables, digits_cost):
    sensitivity = {layer.name: 1.0 + number for number, layer in enumerate(digits_tables)}
    return Problem(digits_cost, Limits(digits_cost.macs // 2, digits_cost.params // 2), digits_tables, sensitivity)


@pytest.fixture
def pace():
    return Pace(Budget(flops="50%"), None, allow_slower=True)


def told(decoder, problem, pace, params):
    """Return what a decoder makes of parameters that were set beforehand, and their trial."""
    study = optuna.create_study()
    study.enqueue_trial(params)
    trial = study.ask()
    return decoder.decide(trial, problem, pace), trial


def test_trial_0_of_allocate_is_the_plain_allocation(problem, pace):
    given = Allocate().given(problem)
    first = given(0)
    assert first["trust"] == Weighing().trust
    assert first["curvature"] == 1.0
    assert set(first) == {
        "trust",
        "curvature",
        *(f"importance/{group}" for group in problem.groups),
        *(f"price/{kind}" for kind in problem.structures),
    }
    assert {value for name, value in first.items() if "/" in name} == {0.0}
    assert [given(slot)["trust"] for slot in range(3)] == [0.5, 0.75, 0.25]
    assert given(3) is None
    assert told(Allocate(), problem, pace, first)[0] == (problem.allocate(Weighing()), None)


def test_then_come_those_in_context_if_it_is_known(problem, pace):
    known = replace(problem, context={layer.name: 2.0 * number for number, layer in enumerate(problem.candidates)})
    given = Allocate().given(known)
    asked = [given(slot) for slot in range(5)]
    assert [params["context"] for params in asked] == [0.0, 0.5, 1.0, 0.0, 0.0]
    assert [params["trust"] for params in asked] == [0.5, 0.5, 0.5, 0.75, 0.25]
    assert given(5) is None
    assert told(Allocate(), known, pace, asked[0])[0] == (problem.allocate(Weighing()), None)
    (allocation, _), trial = told(Allocate(), known, pace, asked[2])
    assert allocation == known.allocate(Weighing(context=1.0)) != problem.allocate(Weighing())
    assert "context" in trial.params
    assert "context" not in told(Allocate(), problem, pace, Allocate().given(problem)(0))[1].params
    places = [Direct().given(known)(slot) for slot in range(6)]
    assert places[2] not in (places[0], None)
    assert places[5] is None


def test_a_front_has_what_nothing_beats_in_every_bounded_cost(problem):
    for layer in problem.candidates:
        kept, cost = front(problem, layer)
        parts = layer.macs / problem.limits.macs + layer.params / problem.limits.params
        assert np.allclose(cost, parts[kept])
        assert (np.diff(cost) < 0).all()
        assert kept[0] == 0
        keys = np.stack([layer.macs, layer.params, layer.error], axis=1)
        beats = (keys[:, None] <= keys[None, kept]).all(axis=2)  # (all, kept)
        assert (beats.sum(axis=0) == 1).all()  # none but itself
        small = (keys[:, :2] <= keys[0, :2]).all(axis=1)
        assert (keys[None, kept] <= keys[small][:, None]).all(axis=2).any(axis=1).all()


def test_under_one_bound_what_costs_less_has_more_error(problem):
    of_params = replace(problem, limits=Limits(params=problem.cost.params // 2))
    for layer in problem.candidates:
        kept, cost = front(of_params, layer)
        assert np.allclose(cost, layer.params[kept] / of_params.limits.params)
        assert (np.diff(cost) < 0).all()
        assert (np.diff(layer.error[kept]) > 0).all()


def test_a_plan_that_uses_less_of_the_scarcer_cost_has_its_place(problem):
    *rest, layer = problem.candidates  # the last one has more of the params than of the MACs
    macs, params = int(layer.macs[0]), int(layer.params[0])
    few = replace(
        layer.take(np.array([0, 1, 2])),
        macs=np.array([macs, macs // 10, macs // 2]),
        params=np.array([params, params * 9 // 10, params // 4]),
        error=np.array([0.0, 0.2, 0.1]),
    )
    rest = [each.take(np.array([0])) for each in rest]
    fixed = problem.cost.macs - macs, problem.cost.params - params
    alone = replace(problem, candidates=[*rest, few], limits=Limits(fixed[0] + macs // 3, fixed[1] + params))
    allocation = alone.allocate(Weighing())
    assert allocation.chosen[-1] == 1
    both = few.macs / alone.limits.macs + few.params / alone.limits.params
    assert both[2] < both[1]  # of less error, and of less cost where both are added
    assert place(alone, places(alone, allocation)).chosen == allocation.chosen


def test_what_grows_in_the_other_cost_has_no_place(problem):
    """Under one bound the allocation doesn't let the network grow in the other cost."""
    *rest, layer = problem.candidates
    macs, params = int(layer.macs[0]), int(layer.params[0])
    few = replace(
        layer.take(np.array([0, 1, 2])),
        macs=np.array([macs, 3 * macs, macs // 2]),
        params=np.array([params, params // 4, params // 3]),
        error=np.array([0.0, 0.1, 0.2]),
    )
    rest = [each.take(np.array([0])) for each in rest]
    alone = replace(problem, candidates=[*rest, few], limits=Limits(params=problem.cost.params - params // 2))
    allocation = alone.allocate(Weighing())
    assert allocation.chosen[-1] == 2
    assert place(alone, places(alone, allocation)).chosen == allocation.chosen


def test_places_begin_at_the_dense_network_and_end_at_the_smallest(problem):
    names = [layer.name for layer in problem.candidates]
    dense = place(problem, dict.fromkeys(names, 0.0))
    assert dense.chosen == (0,) * len(names)
    assert dense.costs == {"macs": problem.cost.macs, "params": problem.cost.params}
    assert dense.error == 0
    assert excess(problem, dense) == pytest.approx({"macs": 1.0, "params": 1.0}, rel=1e-3)
    smallest = place(problem, dict.fromkeys(names, 1.0))
    for layer, index in zip(problem.candidates, smallest.chosen, strict=True):
        assert index == front(problem, layer)[0][-1]
    assert max(excess(problem, smallest).values()) < 0
    assert smallest.gap == 1.0


def test_a_place_between_divides_the_logarithm_of_the_cost(problem):
    layer = problem.candidates[0]
    kept, cost = front(problem, layer)
    half = place(problem, {each.name: 0.5 for each in problem.candidates}).chosen[0]
    wanted = math.sqrt(cost[0] * cost[-1])
    assert half == kept[cost <= wanted * (1 + 1e-6)][0]


def test_every_candidate_of_a_front_is_at_its_own_place(problem):
    plain = problem.allocate(Weighing())
    for number, layer in enumerate(problem.candidates):
        for index in front(problem, layer)[0]:
            chosen = [0] * len(problem.candidates)
            chosen[number] = int(index)
            allocation = replace(plain, chosen=tuple(chosen))
            assert place(problem, places(problem, allocation)).chosen == tuple(chosen)


def test_direct_begins_with_plans_that_keep_the_budget_and_are_no_worse_than_the_plain_ones(problem, pace):
    given = Direct().given(problem)
    for slot, trust in enumerate((0.5, 0.75, 0.25)):
        (allocation, latency), trial = told(Direct(), problem, pace, given(slot))
        assert latency is None
        assert problem.bounds.hold(**allocation.costs)
        assert trial.constraints == excess(problem, allocation)
        plain = problem.allocate(Weighing(trust=trust))
        weights = [problem.sensitivity[layer.name] for layer in problem.candidates]
        errors = [
            [float(layer.error[index]) for layer, index in zip(problem.candidates, each.chosen, strict=True)]
            for each in (allocation, plain)
        ]
        assert np.dot(weights, errors[0]) == pytest.approx(allocation.error)
        assert all(ours <= theirs for ours, theirs in zip(*errors, strict=True))
    assert given(3) is None


def test_what_is_over_the_budget_is_told_as_constraints(problem, pace):
    dense = {f"place/{layer.name}": 0.0 for layer in problem.candidates}
    (allocation, latency), trial = told(Direct(), problem, pace, dense)
    assert latency is None
    assert not problem.bounds.hold(**allocation.costs)
    over = {
        "macs": problem.cost.macs / problem.limits.macs - 1,
        "params": problem.cost.params / problem.limits.params - 1,
    }
    assert trial.constraints == pytest.approx(over)


def test_decoders_by_their_names():
    assert isinstance(new_decoder("allocate"), Allocate)
    assert isinstance(new_decoder("direct"), Direct)


def test_a_layer_that_can_only_stay_dense_has_one_candidate_at_every_place(problem):
    only = problem.candidates[0].take(np.array([0]))
    stuck = replace(problem, candidates=[only, *problem.candidates[1:]])
    names = [layer.name for layer in stuck.candidates]
    for where in (0.0, 0.3, 1.0):
        assert place(stuck, dict.fromkeys(names, where)).chosen[0] == 0
    assert places(stuck, place(stuck, dict.fromkeys(names, 1.0)))[only.name] == 0.0
