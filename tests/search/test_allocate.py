from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.budget import Limits
from kronsearch.errors import BudgetError
from kronsearch.search.allocate import Choices, allocate


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


@st.composite
def networks(draw):
    """Layers whose errors span five decades, of costs near together or apart, and a choice for each of them."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(st.sampled_from([("macs",), ("macs", "params")]))
    layers = []
    for count in generator.integers(2, 7, draw(st.integers(2, 5))):
        units = 10 ** generator.choice([0, 3, 9], len(names))
        costs = generator.integers(0, 9, (len(names), count)) * units[:, None] + generator.integers(0, 3, count)
        error = 10 ** generator.uniform(-5, 0, count) * 10 ** generator.uniform(-3, 0)
        layers.append(Choices(dict(zip(names, costs, strict=True)), error))
    return layers, [int(generator.integers(len(layer.error))) for layer in layers]


def errors_within(layers, limits):
    """Return the errors of all choices within the limits."""
    errors = sum(np.ix_(*(layer.error for layer in layers)))
    within = [sum(np.ix_(*(layer.costs[name] for layer in layers))) <= limit for name, limit in limits.given.items()]
    return errors[np.logical_and.reduce(within)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 3))
def test_a_choice_that_there_is_is_found_and_the_gap_is_true_and_small(network, looser):
    layers, picks = network
    limits = Limits(**{name: total(layers, picks, name) * (4 + looser) // 4 for name in layers[0].costs})
    found = allocate(layers, limits)
    assert limits.hold(**found.costs)
    best = errors_within(layers, limits).min()
    assert found.error * (1 - found.gap) <= best * (1 + 1e-9)
    assert found.gap <= 1e-4


@pytest.mark.parametrize("part", [0.5, 0.8, 0.95])
def test_where_errors_span_decades_a_loose_budget_is_used_to_the_gap_as_well(part):
    generator = np.random.default_rng(1)
    layers, least = [], np.zeros(limit := int(part * 200 * 20) + 1)  # least error by budget
    for _ in range(20):
        macs = np.array([200, *np.unique(generator.integers(1, 200, 25))])
        falling = np.sort(10 ** generator.uniform(-5, 0, len(macs) - 1))[::-1] * 10 ** generator.uniform(-3, 0)
        layers.append(Choices({"macs": macs}, np.array([0.0, *falling])))
        pairs = zip(macs, layers[-1].error, strict=True)
        shifted = [np.r_[np.full(cost, np.inf), least[: limit - cost] + error] for cost, error in pairs]
        least = np.min(shifted, axis=0)
    found = allocate(layers, Limits(limit - 1))
    assert found.error * (1 - found.gap) <= least[-1] * (1 + 1e-9)
    assert found.gap <= 1e-4


def test_a_choice_that_oversteps_a_large_budget_by_one_is_cut_off():
    halves = [choices([(0, 1, 1.0 + place), (5 * 10**8 + place, 1, 0.0)]) for place in range(2)]
    found = allocate(halves, Limits(10**9))
    assert found.chosen == (0, 1)
    assert found.gap <= 1e-4


def test_where_many_choices_overstep_a_large_budget_by_one_the_gap_is_true():
    layers = [choices([(0, 1, 1.0 + place / 100), (10**8, 1, 0.0)]) for place in range(10)]
    found = allocate([*layers, choices([(1, 1, 0.0)])], Limits(5 * 10**8))
    assert found.costs["macs"] == 4 * 10**8 + 1
    assert found.error * (1 - found.gap) <= sum(1.0 + place / 100 for place in range(6))


def test_costs_of_one_budget_that_lie_decades_apart_lose_no_choice():
    """HiGHS's presolve does."""
    columns = [
        ([(39, 4, 5e-6), (5118, 5, 5e-6), (6280, 8, 0.0), (4088, 7, 5e-6)]),
        ([(5, 5 * 10**9, 4e-4), (7, 6 * 10**9, 0.8)]),
        ([(2 * 10**9, 6361, 1e-5), (0, 5981, 7e-3), (4 * 10**9, 5586, 0.0), (7 * 10**9, 4990, 1.5e-3)]),
        ([(2716000, 7, 1e-4), (3669000, 4, 3e-5)]),
        ([(2707, 918, 0.1), (7864, 3197, 0.0)]),
    ]
    layers, limits = [choices(rows) for rows in columns], Limits(7002724191, 5000008201)
    assert allocate(layers, limits).error == pytest.approx(errors_within(layers, limits).min(), rel=1e-4)


def test_without_layers_what_is_fixed_keeps_the_budget_or_does_not():
    found = allocate([], Limits(10, 10), fixed={"macs": 7, "params": 10, "latency": 3})
    assert (found.chosen, found.costs, found.gap) == ((), {"macs": 7, "params": 10, "latency": 3}, 0.0)
    with pytest.raises(BudgetError, match=r"6 MACs can't be reached: .* is 7 MACs"):
        allocate([], Limits(6), fixed={"macs": 7})


def test_what_is_least_in_one_cost_is_taken_where_time_is_short(monkeypatch):
    monkeypatch.setattr("kronsearch.search.knapsack._SECONDS", 0.0)
    generator = np.random.default_rng(3)
    layers = [choices(generator.integers(1, 1000, (20, 3))) for _ in range(10)]
    least = Limits(sum(int(layer.costs["macs"].min()) for layer in layers) + 2000)
    found = allocate(layers, least)
    assert least.hold(**found.costs)
    apart = [choices([(0, 9, 1.0), (9, 0, 1.0)]) for _ in range(2)]
    with pytest.raises(BudgetError, match="no plan within the budget was found: ask for a looser one"):
        allocate(apart, Limits(9, 9))


def test_no_choice_is_better_than_by_the_gap(monkeypatch):
    monkeypatch.setattr("kronsearch.search.knapsack._GAP", 0.5)  # so that it hands back what is not the best
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
    with pytest.raises(BudgetError, match="a budget of 20 MACs can't be reached with no more than the dense network's"):
        allocate(layers, Limits(20, 20), asked=Limits(20))


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
