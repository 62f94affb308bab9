"""Budgets as users write them."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.budget import (
    Amount,
    Budget,
    Limits,
    Span,
    budgets,
    format_cost,
    format_count,
    parse_amount,
    read_span,
)
from kronsearch.errors import BudgetError

UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1G", 10**9),
        ("1.5G", 15 * 10**8),
        ("90k", 90 * 10**3),
        ("90K", 90 * 10**3),
        ("0.27M", 27 * 10**4),
        ("2 T", 2 * 10**12),
        (" 1000 ", 1000),
        (1000, 1000),
        ("1.9", Fraction(19, 10)),
    ],
)
def test_absolute_amounts(written, value):
    assert parse_amount(written, name="flops") == Amount(Fraction(value), relative=False)
    assert parse_amount(written, name="flops").of(10**6) == int(value)


@pytest.mark.parametrize(
    ("written", "dense", "count"),
    [("50%", 1000, 500), ("33.3 %", 1000, 333), ("33.39%", 1000, 333), ("120%", 10, 12), ("29%", 100, 29)],
)
def test_relative_amounts_are_rounded_down_and_exact(written, dense, count):
    amount = parse_amount(written, name="flops")
    assert amount.relative
    assert amount.of(dense) == count


@pytest.mark.parametrize(
    "written",
    ["", "G", "1GB", "1e9", "-1", "-5k", "+1", "1,5G", "1.G", ".5G", "1 000", "50%%", "5ms", "inf", "nan", "1g", "1\n2",
     "١G", "1" * 20, -3, True, pytest.param(10**5000, id="long")],
)  # fmt: skip
def test_what_can_not_be_read_is_refused(written):
    with pytest.raises(BudgetError, match=r"budget of params .* can't be read: write a number such as") as caught:
        parse_amount(written, name="params")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["0", 0, "0.0G", "0%", "0.5", "0.9"])
def test_nothing_is_refused(written):
    with pytest.raises(BudgetError, match=r"budget of flops .* leaves nothing"):
        parse_amount(written, name="flops")


@given(
    whole=st.integers(0, 10**15 - 1),
    part=st.integers(0, 10**9 - 1),
    unit=st.sampled_from(list(UNITS)),
    gap=st.booleans(),
)
@settings(deadline=None)
def test_random_amounts_are_exact(whole, part, unit, gap):
    value = (whole + Fraction(part, 10**9)) * UNITS[unit]
    written = f"{whole}.{part:09d}{' ' if gap else ''}{unit}"
    if value < 1:
        with pytest.raises(BudgetError, match="leaves nothing"):
            parse_amount(written, name="flops")
    elif value > 10**18:
        with pytest.raises(BudgetError, match="more than any network needs"):
            parse_amount(written, name="flops")
    else:
        assert parse_amount(written, name="flops") == Amount(value, relative=False)


@pytest.mark.parametrize(
    ("name", "amount", "told"),
    [
        ("params", "10000000T", "a budget of params 10000000T is more than any network needs: write a smaller number"),
        ("params", 2**63, "more than any network needs"),
        ("flops", "9999999999999999999%", "more than any network needs"),
        ("latency", "10000000000s", "write a smaller time, such as 5ms or 50%"),
    ],
)
def test_what_plans_could_not_hold_is_refused(name, amount, told):
    with pytest.raises(BudgetError, match=told) as caught:
        Budget(**{name: amount})
    assert "\n" not in str(caught.value)


def test_many_times_the_dense_network_is_a_bound_that_plans_can_hold():
    limits = Budget(flops="50%", params="1000000000000000%").limits(dense_macs=10**9, dense_params=10**9)
    assert limits == Limits(5 * 10**8, 10**18)


@given(st.text(max_size=12))
@settings(deadline=None, max_examples=100)
def test_any_text_is_read_or_refused(text):
    try:
        value = parse_amount(text, name="flops").value
    except BudgetError:
        return
    assert value > 0
    assert text.strip()[0].isdecimal()


@given(st.integers(1, 10**15 - 1))
@settings(deadline=None)
def test_ints_are_themselves(count):
    assert parse_amount(count, name="params").of(5) == count


def test_limits():
    budget = Budget(flops="50%", params="90k")
    assert budget.limits(dense_macs=1001, dense_params=10**5) == Limits(macs=500, params=90_000)
    assert Budget(flops=700).limits(dense_macs=1001, dense_params=10**5) == Limits(macs=700, params=None)
    assert Budget(params="1%").limits(dense_macs=1001, dense_params=10**5) == Limits(macs=None, params=1000)


@pytest.mark.parametrize(
    ("written", "nanoseconds"), [("5ms", 5 * 10**6), ("0.8 ms", 8 * 10**5), ("800us", 8 * 10**5), ("1.5s", 15 * 10**8)]
)
def test_times_are_read_in_nanoseconds(written, nanoseconds):
    assert parse_amount(written, name="latency") == Amount(Fraction(nanoseconds), relative=False)
    assert parse_amount("70%", name="latency").of(nanoseconds) == 7 * nanoseconds // 10


@pytest.mark.parametrize("written", ["5", 5, "5G", "5 m", "5m", "ms", "-5ms", "5ms ms", "5 sec", "1h"])
def test_a_time_has_a_unit(written):
    with pytest.raises(BudgetError, match=r"budget of latency .* can't be read: write a time such as 5ms"):
        Budget(latency=written)
    with pytest.raises(BudgetError, match="latency 0ms leaves nothing: write a time above zero, such as 5ms"):
        Budget(latency="0ms")


def test_a_latency_that_is_not_measured_yet_is_left_open():
    budget = Budget(flops="200%", latency="50%")
    assert budget.limits(dense_macs=10, dense_params=10) == Limits(macs=20)
    assert budget.limits(dense_macs=10, dense_params=10, dense_latency=999) == Limits(macs=20, latency=499)
    assert str(budget) == "flops 200%, latency 50%"
    with pytest.raises(BudgetError, match=r"kept by the dense model already \(1 k MACs, 10 params, 4.5 ms\)"):
        Budget(latency="4.5ms").limits(dense_macs=1000, dense_params=10, dense_latency=45 * 10**5)


def test_costs_are_written_with_their_units():
    assert [format_cost(name, 1_819_000) for name in ("macs", "params", "latency")] == [
        "1.819 M MACs",
        "1.819 M params",
        "1.819 ms",
    ]


def test_a_sweep_over_times():
    assert [budget.latency for budget in budgets(latency="4ms:8ms:4")] == ["4ms", "5.333333ms", "6.666666ms", "8ms"]
    assert [str(budget) for budget in budgets(flops="1G", latency="50%,500us")] == [
        "flops 1G, latency 50%",
        "flops 1G, latency 500us",
    ]


def test_one_bound_that_the_dense_model_keeps_is_no_error():
    assert Budget(flops="1G", params="50%").limits(dense_macs=10, dense_params=10) == Limits(macs=10**9, params=5)


@pytest.mark.parametrize(
    ("flops", "params"), [("1G", None), (None, "100%"), ("100%", "100%"), (2000, "200%"), ("1k", None)]
)
def test_a_budget_that_the_dense_model_keeps_is_refused(flops, params):
    with pytest.raises(BudgetError, match=r"kept by the dense model already \(1 k MACs, 500 params\)"):
        Budget(flops=flops, params=params).limits(dense_macs=1000, dense_params=500)


def test_no_bound_is_refused():
    with pytest.raises(BudgetError, match="no budget given: pass --budget-flops"):
        Budget()


def test_a_bad_bound_is_refused_at_once():
    with pytest.raises(BudgetError, match="budget of params 'many' can't be read"):
        Budget(flops="1G", params="many")


def test_written_as_the_user_did():
    assert str(Budget(flops="50%", params="90k")) == "flops 50%, params 90k"
    assert str(Budget(params=90_000)) == "params 90000"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (272_474, "272.5 k"),
        (1_000_000, "1 M"),
        (1_819_066_368, "1.819 G"),
        (1_500_000_000_000, "1.5 T"),
        (123_456_000_000_000, "123.5 T"),
    ],
)
def test_counts_are_written_with_a_unit(count, text):
    assert format_count(count) == text


@given(st.integers(0, 10**15 - 1))
@settings(deadline=None)
def test_written_counts_are_near_and_can_be_read_again(count):
    text = format_count(count)
    if count >= 1:
        assert abs(parse_amount(text, name="flops").value - count) <= Fraction(count, 1000)
    assert "e" not in text


@pytest.mark.parametrize(
    ("written", "amounts"),
    [
        ("25%:100%:4", ["25%", "50%", "75%", "100%"]),
        ("25%:90%:3", ["25%", "57.5%", "90%"]),
        ("10%:20%:4", ["10%", "13.33%", "16.67%", "20%"]),
        ("1G:2G:3", ["1G", str(15 * 10**8), "2G"]),
        (" 1 k : 2k : 2", ["1 k", "2k"]),
        ("30%, 50%,1G", ["30%", "50%", "1G"]),
        ("1M:5000T:4", ["1M", "1666666667333333", "3333333333666666", "5000T"]),
        ("1%:30000000%:3", ["1%", "15000000.5%", "30000000%"]),
    ],
)
def test_the_budgets_of_a_sweep(written, amounts):
    assert budgets(flops=written) == [Budget(flops=amount) for amount in amounts]
    assert budgets(params=written, flops="40%") == [Budget(flops="40%", params=amount) for amount in amounts]


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(2, 1000))
def test_evenly_spaced_counts(low, width, count):
    if width < count:
        return
    amounts = [int(str(budget.params)) for budget in budgets(params=f"{low}:{low + width}:{count}")]
    assert amounts == [low + width * place // (count - 1) for place in range(count)]


@pytest.mark.parametrize(
    ("flops", "params", "message"),
    [
        (None, None, "no budgets given: pass several"),
        ("50%", None, "one budget given: pass several"),
        ("50%", "1M", "one budget given: pass several"),
        ("30%,50%", "1k:2k:3", "flops and params have several values"),
        ("30%,,50%", None, "a budget of flops '' can't be read"),
        ("30%,lots", None, "a budget of flops 'lots' can't be read"),
        ("30%,30.0%", None, "not all different"),
        ("1:3:5", None, "not all different"),
        ("30%:50%", None, "write FROM:TO:HOW MANY"),
        ("30%:50%:1", None, "write FROM:TO:HOW MANY"),
        ("30%:50%:1001", None, "with 2 to 1000"),
        ("30%:50%:x", None, "write FROM:TO:HOW MANY"),
        ("30%:50%:3:4", None, "write FROM:TO:HOW MANY"),
        ("30%:1G:3", None, "go nowhere"),
        ("50%:30%:3", None, "go nowhere"),
        ("30%:30%:3", None, "go nowhere"),
        (None, "a:b:3", "a budget of params 'a' can't be read"),
    ],
)
def test_budgets_that_make_no_sweep(flops, params, message):
    with pytest.raises(BudgetError, match=message) as caught:
        budgets(flops=flops, params=params)
    assert "\n" not in str(caught.value)


def test_limits_hold_what_is_inside():
    assert Limits(10, None).hold(macs=10, params=10**9)
    assert not Limits(10, None).hold(macs=11, params=0)
    assert not Limits(None, 5).hold(macs=0, params=6)
    assert Limits(latency=7).hold(macs=1, latency=7)
    assert not Limits(latency=7).hold(macs=1, latency=8)
    assert Limits(None, 5, 7).given == {"params": 5, "latency": 7}


def test_a_span_has_a_budget_at_every_place():
    """Even steps are even ratios; the ends are as written."""
    span = read_span(flops=" 20% : 80%", params="90k")
    assert span == Span("flops", "20%", "80%", "90k")
    assert [span.at(place) for place in (0.0, 0.5, 1.0)] == [
        Budget(flops="20%", params="90k"),
        Budget(flops="40%", params="90k"),
        Budget(flops="80%", params="90k"),
    ]
    assert str(span) == "flops 20%:80%, params 90k"
    counts = read_span(params="1k:100k")
    assert [counts.at(place).params for place in (0.0, 0.5, 1.0)] == ["1k", "10000", "100k"]
    assert str(counts) == "params 1k:100k"
    narrow = read_span(flops="0.012344%:0.012346%")
    assert [narrow.at(place).flops for place in (0.25, 0.75)] == ["0.012344%", "0.012346%"]
    assert read_span(flops="0.004%:0.02%").at(0.01).flops == "0.004065%"
    assert read_span(flops="1M:5000T", params="50%").at(0.99).flops == "3999266122611856"


@given(st.integers(1, 10**18), st.integers(1, 10**18), st.booleans(), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_what_a_span_writes_can_be_read(one, other, relative, place):
    low, high = sorted((one, other))
    unit = "%" if relative else ""
    if low < high:
        written = read_span(params=f"{low}{unit}:{high}{unit}").at(place).params
        assert low <= parse_amount(written, name="params").value * (100 if relative else 1) <= high


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "none of the budgets of flops and params has two ends"),
        ({"flops": "30%", "params": 90_000}, "none of the budgets"),
        ({"flops": "30%:50%", "params": "1k:2k"}, "each of the budgets of flops and params has two ends"),
        ({"flops": "30%:50%:20"}, "write FROM:TO"),
        ({"flops": "30%:1G"}, "go nowhere"),
        ({"flops": "50%:50%"}, "go nowhere"),
        ({"flops": "30%:"}, "can't be read"),
        ({"flops": "30%:50%", "params": "many"}, "can't be read"),
    ],
)
def test_what_is_no_span_is_refused(asked, told):
    with pytest.raises(BudgetError, match=told):
        read_span(**asked)
