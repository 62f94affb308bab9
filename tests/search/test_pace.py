"""What latency does to a search, on a hand-made machine where a network takes the sum of its layers' times."""

from dataclasses import replace

import pytest

from kronsearch.budget import Budget
from kronsearch.errors import BudgetError
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import Pace, specs_of
from kronsearch.search.stopwatch import Stopwatch
from kronsearch.sekron import Structure

PLAIN = Weighing()


@pytest.fixture
def pose(stopwatch, hand_timer, digits_cost, digits_tables):
    """Return what makes a pace and the problem without latency of a budget and a machine."""

    def make(budget, parts, *, allow_slower=False, noise=1.0):
        timer = hand_timer(parts, noise)
        pace = Pace(budget, stopwatch(timer), allow_slower)
        sensitivity = {layer.name: 1.0 for layer in digits_tables}
        return pace, Problem(digits_cost, pace.limits(digits_cost), digits_tables, sensitivity), timer

    return make


@pytest.fixture
def honest(digits_tables):
    """Return a machine on which layers take as much of the time as of the parameters."""
    params = {layer.kernel_shape: int(layer.params[0]) for layer in digits_tables}
    return lambda spec: spec.params / params[spec.kernel_shape]


def slow_but(kind):
    return lambda spec: 0.5 if spec.structure is kind else 1.5


def kinds(problem, allocation):
    return {spec.structure for spec in specs_of(problem.candidates, allocation).values()}


def test_with_slower_layers_allowed_nothing_is_measured(pose):
    pace, plain, timer = pose(Budget(flops="50%"), None, allow_slower=True)
    assert pace.problem(plain) is plain
    assert pace.allocate(plain, PLAIN) == (plain.allocate(PLAIN), None)
    assert pace.identity == {}
    assert not timer.lineups


def test_what_is_slower_than_its_dense_layer_is_not_chosen(pose, monkeypatch):
    monkeypatch.setattr("kronsearch.search.pace._WORTH", 100.0)
    pace, plain, _ = pose(Budget(flops="80%"), slow_but(Structure.SPATIAL))
    problem = pace.problem(plain)
    assert kinds(problem, problem.allocate(PLAIN)) == {Structure.SPATIAL}
    assert problem.structures == [Structure.SPATIAL]
    assert pace.allocate(problem, PLAIN) == (problem.allocate(PLAIN), None)


@pytest.mark.parametrize("noise", [1.0, 1.1])
def test_a_network_shall_take_little_more_than_its_part_of_the_time(pose, honest, noise, monkeypatch):
    monkeypatch.setattr("kronsearch.search.pace._WORTH", 100.0)
    pace, plain, _ = pose(Budget(flops="50%"), honest, noise=noise)
    problem = pace.problem(plain)
    part = 1.3 * plain.limits.macs / plain.cost.macs
    assert problem.limits.macs == plain.limits.macs
    assert problem.limits.latency <= part * pace.stopwatch.nanoseconds
    allocation, latency = pace.allocate(problem, PLAIN)
    assert latency is None
    assert problem.limits.hold(**allocation.costs)
    assert pace.stopwatch.compare(specs_of(problem.candidates, allocation)).ratio <= part


def test_a_network_that_keeps_most_of_its_flops_may_take_its_time(pose, honest):
    pace, plain, timer = pose(Budget(flops="90%"), honest)
    assert pace.problem(plain).limits == plain.limits
    assert not timer.compared


def test_what_costs_too_much_is_let_go(pose, honest, monkeypatch):
    monkeypatch.setattr("kronsearch.search.pace._FAIR", 0.6)
    pace, plain, _ = pose(Budget(flops="50%"), honest)
    problem = pace.problem(plain)
    assert problem.limits == plain.limits
    assert problem.latency == pace.stopwatch.nanoseconds


@pytest.mark.parametrize("parts", [lambda spec: 2.0, slow_but(Structure.BOTTLENECK)])
def test_a_budget_that_only_slow_layers_keep_well_is_kept_with_them(pose, parts, monkeypatch):
    pace, plain, _ = pose(Budget(flops="30%"), parts)
    monkeypatch.setattr("kronsearch.search.pace._WORTH", 1.0)
    assert pace.problem(plain) is plain
    timed, unable = pose(Budget(params="1%"), parts)[:2]
    with pytest.raises(BudgetError, match="can't be reached"):
        timed.problem(unable)


@pytest.mark.parametrize("noise", [1.0, 1.2, 0.8])
def test_a_budget_of_latency_is_aimed_at_by_measuring_whole_networks(pose, honest, noise):
    pace, plain, timer = pose(Budget(latency="70%"), honest, noise=noise)
    problem = pace.problem(plain)
    allocation, latency = pace.allocate(problem, PLAIN)
    assert 0.85 * 0.7 <= latency.ratio <= 0.7
    predicted = allocation.costs["latency"] / pace.stopwatch.nanoseconds
    assert latency.ratio == pytest.approx(noise * predicted, rel=1e-3)
    assert specs_of(problem.candidates, allocation) in timer.compared


def test_an_absolute_budget_is_of_what_was_measured(pose, honest, digits_tables):
    budget = 0.6 * len(digits_tables)
    pace, plain, _ = pose(Budget(latency=f"{budget:.3f}ms", flops="90%"), honest, noise=1.1)
    _, latency = pace.allocate(pace.problem(plain), PLAIN)
    assert 0.85 * budget <= latency.compressed_ms <= budget
    assert pace.used(latency) == pytest.approx(latency.compressed_ms / budget)


def test_a_plan_that_misses_is_allocated_anew_and_given_up_in_the_end(pose, honest, monkeypatch):
    pace, plain, timer = pose(Budget(latency="70%"), honest)
    problem = pace.problem(plain)
    timer.noise = 1.3
    _, latency = pace.allocate(problem, Weighing(importance={problem.groups[0]: 3.0}))
    assert latency.ratio <= 0.7
    slow = latency.model_copy(update={"ratio": 1.5})
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: slow)
    assert pace.allocate(problem, PLAIN) is None


@pytest.mark.parametrize(("asked", "noise", "least"), [("20%", 1.0, r"[56]\d.\d%"), ("80%", 3.0, r"[12]\d\d.\d%")])
def test_what_can_not_be_reached_names_the_fastest(pose, asked, noise, least):
    pace, plain, _ = pose(Budget(latency=asked), slow_but(Structure.SPATIAL), noise=noise)
    with pytest.raises(BudgetError, match=rf"the fastest network that was found takes {least} .*\(--allow-slower"):
        pace.problem(plain)


def test_what_fails_for_another_budget_than_that_of_latency_says_so(pose):
    pace, plain, timer = pose(Budget(latency="10s", flops="30%"), lambda spec: 2.0)
    message = (
        r"budget of 630.3 k MACs can't be reached: the smallest that can is 2100864 MACs with no layer slower than"
    )
    with pytest.raises(BudgetError, match=message) as caught:
        pace.problem(plain)
    assert "latency" not in str(caught.value)
    assert not timer.compared


def test_a_latency_that_the_dense_network_keeps_is_refused(pose, honest):
    with pytest.raises(BudgetError, match=r"kept by the dense model already \(.*, 6 ms\): nothing needs to be done"):
        pose(Budget(latency="100%"), honest)
    with pytest.raises(BudgetError, match="nothing needs to be done"):
        pose(Budget(latency="1s", flops="200%"), honest)


def test_a_network_without_replaceable_layers_is_refused(pose, honest):
    pace, plain, _ = pose(Budget(latency="50%"), honest)
    with pytest.raises(BudgetError, match="latency 50% can't be kept: the model has no layer that can be replaced"):
        pace.problem(replace(plain, candidates=[]))


def test_the_setting_is_part_of_a_study(pose, honest):
    pace, _, _ = pose(Budget(flops="50%"), honest)
    assert pace.identity == {"latency": "batch 1, threads 1"}
    pace, _, _ = pose(Budget(latency="50%"), honest, allow_slower=True)
    assert pace.identity == {"latency": "batch 1, threads 1", "slower layers": "allowed"}


def test_the_winner_is_measured_unless_it_was(pose, honest, plan):
    pace, _, timer = pose(Budget(flops="50%"), honest)
    replaced = plan.model_copy(update={"layers": {}})
    timer.compare = None
    taken = pose(Budget(latency="70%"), honest, allow_slower=True)[0]
    timed = replaced.model_copy(update={"latency": "known"})
    assert pace.measured(timed) is taken.measured(timed) is timed
    assert pose(Budget(flops="50%"), honest, allow_slower=True)[0].measured(replaced) is replaced


def test_an_allocation_that_stands_is_measured_once_and_let_go_if_it_is_too_slow(pose, honest):
    pace, plain, timer = pose(Budget(latency="60%"), honest)
    problem = pace.problem(plain)
    allocation = problem.allocate(PLAIN)
    kept, latency = pace.checked(problem, allocation)
    assert kept is allocation
    assert latency.ratio <= 0.6
    dense = replace(allocation, chosen=(0,) * len(problem.candidates))
    compared = len(timer.compared)
    assert pace.checked(problem, dense) is None
    assert len(timer.compared) == compared + 1


def test_without_a_budget_of_latency_an_allocation_that_stands_is_not_measured(pose, honest):
    pace, plain, timer = pose(Budget(flops="50%"), honest, allow_slower=True)
    allocation = plain.allocate(PLAIN)
    assert pace.checked(plain, allocation) == (allocation, None)
    assert not timer.compared
