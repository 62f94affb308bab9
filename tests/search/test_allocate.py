from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from kronsearch.budget import Limits
from kronsearch.errors import BudgetError
from kronsearch.search.allocate import Choices, _Program, allocate


def choices(rows):
    macs, params, error = zip(*rows, strict=True)
    return Choices({"macs": np.array(macs), "params": np.array(params)}, np.array(error, dtype=float))


def total(layers, picks, name, fixed=0):
    return fixed + sum(int(layer.costs[name][i]) for layer, i in zip(layers, picks, strict=True))


def brute_force(layers, limits, fixed):
    best = None
    for picks in product(*(range(len(layer.error)) for layer in layers)):
        macs, params = (total(layers, picks, name, fixed) for name in ("macs", "params"))
        error = sum(layer.error[i] for layer, i in zip(layers, picks, strict=True))
        fits = (limits.macs is None or macs <= limits.macs) and (limits.params is None or params <= limits.params)
        if fits and (best is None or error < best):
            best = error
    return best


rows = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900), st.integers(0, 1000)), min_size=1, max_size=5)
bound = st.one_of(st.none(), st.integers(20, 3000))


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), bound, bound, st.integers(0, 50))
def test_equals_brute_force_under_any_combination_of_budgets(table, macs, params, fixed):
    layers, limits = [choices(layer) for layer in table], Limits(macs, params)
    expected = brute_force(layers, limits, fixed)
    if expected is None:
        with pytest.raises(BudgetError, match="can't be reached"):
            allocate(layers, limits, fixed={"macs": fixed, "params": fixed})
        return
    found = allocate(layers, limits, fixed={"macs": fixed, "params": fixed})
    assert found.costs == {name: total(layers, found.chosen, name, fixed) for name in ("macs", "params")}
    assert limits.hold(**found.costs)
    assert expected <= found.error <= expected * (1 + 1e-3) + 1e-9
    assert 0 <= found.gap <= 1e-3


def test_any_cost_can_be_bounded_and_those_that_are_not_are_told():
    generator = np.random.default_rng(2)
    names = ("macs", "params", "latency")
    layers = [
        Choices({name: generator.integers(1, 10**6, 6) for name in names}, generator.uniform(0, 1, 6)) for _ in range(4)
    ]
    picks = list(product(range(6), repeat=4))
    for bounded in (("latency",), ("macs", "latency"), names):
        limits = Limits(**dict.fromkeys(bounded, 15 * 10**5))
        fits = [p for p in picks if all(total(layers, p, name, 9) <= 15 * 10**5 for name in bounded)]
        best = min(sum(layer.error[i] for layer, i in zip(layers, p, strict=True)) for p in fits)
        found = allocate(layers, limits, fixed=dict.fromkeys(names, 9))
        assert found.error == pytest.approx(best, rel=1e-4)
        assert found.costs == {name: total(layers, found.chosen, name, 9) for name in names}
    with pytest.raises(BudgetError, match=r"2e-05 ms can't be reached: .* is 1.306 ms"):
        allocate(layers, Limits(latency=20))


def test_a_budget_is_kept_to_the_last_mac():
    layers = [choices([(10**9, 1, 0.0), (10**9 - 1, 1, 1.0), (5, 1, 9.0)])]
    assert allocate(layers, Limits(10**9 - 1, None)).costs["macs"] < 10**9


def test_what_lies_too_near_to_the_budget_to_be_seen_is_in_the_gap():
    layers = [choices([(10**9 + 1, 1, 0.0), (10**9 - 100, 1, 1.0), (5, 1, 9.0)])]
    found = allocate(layers, Limits(10**9, None))
    assert found.costs["macs"] <= 10**9
    assert found.error * (1 - found.gap) <= 1.0
    with pytest.raises(BudgetError, match="no plan within the budget was found: ask for a looser one"):
        allocate([choices([(10**9 + 1, 1, 0.0), (10**9 - 100, 1, 1.0)])], Limits(10**9, None))


def test_no_choice_is_better_than_by_the_gap(monkeypatch):
    monkeypatch.setattr("kronsearch.search.allocate._GAP", 0.5)  # so that it hands back what is not the best
    generator = np.random.default_rng(5)
    worse = 0
    for _ in range(30):
        layers = [
            Choices({name: generator.integers(1, 1000, 6) for name in ("macs", "params")}, generator.uniform(0, 1, 6))
            for _ in range(4)
        ]
        best = brute_force(layers, limits := Limits(2000, 2000), 0)
        if best is None:
            continue
        found = allocate(layers, limits)
        assert found.error * (1 - found.gap) <= best * (1 + 1e-6)
        worse += found.error > best * (1 + 1e-6)
    assert worse > 0


def test_an_unreachable_budget_names_the_smallest():
    layers = [choices([(100, 10, 0.0), (30, 5, 1.0)]), choices([(50, 4, 0.0)])]
    with pytest.raises(BudgetError, match=r"85 MACs can't be reached: .* is 87 MACs"):
        allocate(layers, Limits(85, None), fixed={"macs": 7})


def test_two_budgets_that_only_exclude_each_other():
    layers = [choices([(10, 100, 0.0), (100, 10, 0.0)])]
    with pytest.raises(BudgetError, match="each by itself, is 10 MACs and 10 params"):
        allocate(layers, Limits(20, 20))


def test_many_layers_with_many_candidates_are_solved_to_the_gap():
    """As many as a ResNet-50 has."""
    generator = np.random.default_rng(0)
    layers = []
    for _ in range(54):
        macs, params = generator.integers(10**4, 10**8, (2, 1000))
        depth = generator.uniform(0.5, 3)
        error = np.exp(-depth * (np.log(macs) + 0.5 * np.log(params)) / 10) * generator.uniform(0.8, 1.2, 1000)
        layers.append(Choices({"macs": macs, "params": params}, error))
    for limits in (Limits(54 * 10**7, None), Limits(54 * 10**7, 54 * 2 * 10**7)):
        found = allocate(layers, limits)
        assert limits.hold(**found.costs)
        assert found.gap <= 1e-3


@pytest.mark.parametrize("tightness", [0.02, 0.2, 0.6])
def test_the_floor_is_the_error_of_the_whole_relaxation(tightness):
    generator = np.random.default_rng(1)
    count, layers = 400, 10
    owner = np.repeat(np.arange(layers), count // layers)
    costs, errors = generator.integers(1, 10**6, (2, count)), generator.uniform(0, 1, count)
    limits = (costs.reshape(2, layers, -1).max(2).sum(1) * tightness).astype(int)
    one_each = (owner == np.arange(layers)[:, None]).astype(float)
    oracle = linprog(errors, A_ub=costs / limits[:, None], b_ub=[1, 1], A_eq=one_each, b_eq=np.ones(layers))
    excess, floor = _Program(errors, owner, costs, limits)._excesses()
    assert (excess >= 0).all()
    assert (excess.reshape(layers, -1).min(1) == 0).all()
    if oracle.success:
        assert floor == pytest.approx(oracle.fun, rel=1e-9)
    else:
        assert floor > layers  # above any error there is
