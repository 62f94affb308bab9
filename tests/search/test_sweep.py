from types import SimpleNamespace

import pandas as pd
import pytest

import kronsearch as ks
from kronsearch.budget import Limits
from kronsearch.errors import BudgetError, FileError, ModelError
from kronsearch.search import prepare
from kronsearch.search.allocate import Allocation
from kronsearch.search.space import SearchSpace
from kronsearch.search.subject import Subject
from kronsearch.search.sweep import sweep

SPACE = SearchSpace(deep_fits=3)
SHAPE = (1, 8, 8)
CANDIDATES = []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(digits_model, cache, tmp_path_factory):
    """A sweep, and what it told."""
    told = []
    front = sweep(
        digits_model,
        flops="20%:80%:7",
        params="60%",
        space=SPACE,
        input_shape=SHAPE,
        allow_slower=True,
        cache=cache,
        out=tmp_path_factory.mktemp("sweep") / "out",
        model_spec="zoo:digits",
        watch=told.append,
    )
    return front, told


def test_a_larger_budget_never_has_the_larger_objective(found, digits_cost):
    front, _ = found
    errors = [point.weighed_error for point in front.points]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 3
    for point, percent in zip(front.points, range(20, 81, 10), strict=True):
        assert point.plan.budget.flops == f"{percent}%"
        assert point.plan.compressed.macs <= digits_cost.macs * percent // 100 == point.plan.budget.max_macs
        assert point.plan.compressed.params <= digits_cost.params * 6 // 10 == point.plan.budget.max_params
        assert point.plan.provenance.gap <= 1e-3


def test_files_hold_what_the_front_does(found):
    front, _ = found
    table = pd.read_csv(front.out / "front.csv")
    pd.testing.assert_frame_equal(table, front.table, check_dtype=False)
    assert table.columns.tolist() == [
        *("budget_flops", "budget_params", "max_macs", "max_params", "macs", "params"),
        *("predicted_error", "weighed_error", "gap", "plan"),
    ]
    for name, point in zip(table["plan"], front.points, strict=True):
        assert ks.load_plan(front.out / name) == point.plan
    assert sorted(path.name for path in front.out.iterdir()) == ["front.csv", "plans"]
    assert front.points[0].name == "plans/flops-20pct-params-60pct.json"


def test_budgets_may_be_asked_in_any_order(digits_model, cache):
    front = sweep(digits_model, flops="80%,30%,50%", space=SPACE, input_shape=SHAPE, allow_slower=True, cache=cache)
    assert [point.plan.budget.flops for point in front.points] == ["30%", "50%", "80%"]


def test_a_plan_costs_by_fvcore_what_it_says(found, digits_model):
    plan = found[0].points[3].plan
    cost = ks.profile_model(ks.apply_plan(digits_model, plan), input_shape=SHAPE)
    assert (cost.macs, cost.params) == (plan.compressed.macs, plan.compressed.params)


def test_a_point_is_trial_0_of_a_search(found, digits_model, cache, monkeypatch):
    """The tables are those of the sweep, from the cache; and without data the weighed error is the predicted one."""
    monkeypatch.setattr(prepare, "layer_candidates", None)
    budget = ks.Budget(flops="50%", params="60%")
    plan = ks.search(digits_model, budget=budget, space=SPACE, input_shape=SHAPE, cache=cache, allow_slower=True).plan
    point = found[0].points[3]
    assert point.plan.layers == plan.layers
    assert point.plan.predicted_error == plan.predicted_error
    assert point.weighed_error == pytest.approx(plan.predicted_error, rel=1e-12)


def test_with_data_the_front_is_of_what_is_weighed(digits_model, digits_data, digits_cost):
    space = SearchSpace(structures=("spatial",))
    front = sweep(digits_model, digits_data, params="30%,70%", space=space, allow_slower=True)
    small, large = front.points
    assert small.weighed_error > large.weighed_error
    assert small.weighed_error != pytest.approx(small.plan.predicted_error, rel=1e-3)
    assert small.plan.decomposition.calibration_images > 0
    assert small.plan.compressed.macs <= digits_cost.macs
    assert front.out is None


def test_every_phase_is_told_in_order(found):
    _, told = found
    assert list(dict.fromkeys(step.phase for step in told)) == ["profile", "tables", "budgets"]
    assert [(step.done, step.total) for step in told if step.phase == "budgets"] == [(n, 7) for n in range(8)]


def problem(macs, allocation):
    return SimpleNamespace(bounds=Limits(macs, 100), candidates=CANDIDATES, allocation=allocation)


def test_what_was_found_for_a_smaller_budget_serves_a_larger_one_too():
    from kronsearch.search.sweep import _allocations

    good = Allocation((1,), {"macs": 40, "params": 9}, 0.50, gap=0.0)
    poor = Allocation((2,), {"macs": 60, "params": 9}, 0.51, gap=0.04)
    cheap = Allocation((3,), {"macs": 20, "params": 9}, 0.9, gap=0.1)
    told = SimpleNamespace(tell=lambda *step: None)
    pace = SimpleNamespace(
        allocate=lambda problem, weighing: (problem.allocation, None),
        checked=lambda problem, allocation: (allocation, None),
    )
    problems = [problem(30, cheap), problem(50, good), problem(70, poor)]
    best = _allocations(problems, [pace] * 3, told)
    assert [allocation.chosen for allocation in best] == [(3,), (1,), (1,)]
    assert [allocation.gap for allocation in best] == pytest.approx([0.1, 0.0, 1 - 0.51 * (1 - 0.04) / 0.50])
    problems[1].candidates = []  # an index says nothing among other candidates
    assert [allocation.chosen for allocation in _allocations(problems, [pace] * 3, told)] == [(3,), (1,), (2,)]
    missed = SimpleNamespace(allocate=pace.allocate, checked=lambda problem, allocation: None)
    problems[1].candidates = CANDIDATES
    assert [a.chosen for a in _allocations(problems, [pace, pace, missed], told)] == [(3,), (1,), (2,)]
    none = SimpleNamespace(allocate=lambda problem, weighing: None, budget="latency 5ms")
    with pytest.raises(BudgetError, match="no plan within latency 5ms was found"):
        _allocations(problems[:1], [none], told)


def test_a_front_of_latencies_is_measured(digits_model, stopwatch, hand_timer, monkeypatch):
    dense = {tuple(weight.shape): weight.numel() for weight in digits_model.parameters()}
    timer = hand_timer(lambda spec: spec.params / dense[spec.kernel_shape])
    monkeypatch.setattr(Subject, "stopwatch", lambda _, setting: stopwatch(timer, setting))
    space = SearchSpace(structures=("spatial",))
    front = sweep(digits_model, latency="60%:90%:3", flops="95%", input_shape=SHAPE, space=space)
    assert list(front.table["budget_latency"]) == ["60%", "75%", "90%"]
    assert (front.table["latency_ratio"] <= [0.6, 0.75, 0.9]).all()
    assert front.points[0].name == "plans/flops-95pct-latency-60pct.json"
    assert [point.plan.latency.ratio for point in front.points] == list(front.table["latency_ratio"])
    errors = [point.weighed_error for point in front.points]
    assert errors == sorted(errors, reverse=True)


def test_what_can_not_be_is_refused_before_there_is_a_file(digits_model, tmp_path):
    out = tmp_path / "out"
    for budgets, error, message in (
        ({"flops": "1%:50%:5"}, BudgetError, r"a budget of 21.01 k MACs can't be reached: the smallest .* is \d+ MACs"),
        ({"flops": "5%:50%:5", "params": "1%"}, BudgetError, "can't be reached: the smallest"),
        ({"flops": "50%:200%:5"}, BudgetError, "is kept by the dense model already"),
        ({"flops": "50%"}, BudgetError, "one budget given: pass several"),
        ({"flops": "30%,50%", "input_shape": None}, ModelError, r"pass one \(--input-shape\)"),
    ):
        with pytest.raises(error, match=message):
            sweep(digits_model, **{"input_shape": SHAPE, "space": SPACE, "out": out, **budgets})
        assert not out.exists()


def test_a_folder_that_can_not_be_is_told_before_anything_is_computed(digits_model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "layer_candidates", None)
    (tmp_path / "plans").touch()
    with pytest.raises(FileError, match=r"plans .*: pass another --out"):
        sweep(digits_model, flops="30%,50%", input_shape=SHAPE, space=SPACE, out=tmp_path)
