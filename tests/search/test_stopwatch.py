"""What is measured of which candidates, and kept; the machine is a hand-made one."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from kronsearch.errors import ModelError
from kronsearch.search import stopwatch as module
from kronsearch.search.stopwatch import Setting, _ratio
from kronsearch.sekron import Structure
from kronsearch.sekron.shapes import structure_of

DEAR = 3.0


def by_rank(spec):
    """Return less than 1 for spatial sequences of low rank, and DEAR for those of mixed channels."""
    return DEAR if spec.structure is Structure.MIXING else 0.25 + spec.ranks[0] / 40


def never(*args, **options):
    raise AssertionError("measured anew")


def test_latencies_are_those_of_the_machine(stopwatch, hand_timer, digits_tables):
    watch = stopwatch(hand_timer(by_rank))
    assert watch.nanoseconds == 10**6 * len(digits_tables)
    for before, layer in zip(digits_tables, watch.timed(digits_tables, keep_slower=True), strict=True):
        assert layer.latency[0] == 10**6
        for index in range(1, len(layer)):  # linear in the rank, so exact between those that are measured
            assert layer.latency[index] == pytest.approx(1e6 * by_rank(layer.spec(index)), abs=1)
        assert set(layer.costs) == {"macs", "params", "latency"}
        assert len(set(before.sequence)) > 24 or len(layer) == len(before)


def test_what_is_slower_than_dense_is_left_out(stopwatch, hand_timer, digits_tables):
    timer = hand_timer(by_rank)
    watch = stopwatch(timer)
    kept = watch.timed(digits_tables, keep_slower=False)
    for before, layer in zip(digits_tables, kept, strict=True):
        assert (layer.latency <= 10**6).all()
        wanted = {before.spec(i) for i in range(1, len(before)) if by_rank(before.spec(i)) <= 1}
        assert {layer.spec(i) for i in range(1, len(layer))} == wanted
        assert layer.rank[0] == 0
    measured = Counter((name, spec.factor_shapes) for lineup in timer.lineups for name, spec in lineup.items())
    mixing = {(name, shapes) for name, shapes in measured if structure_of(shapes) is Structure.MIXING}
    assert mixing
    assert {measured[which] for which in mixing} == {1}  # at its lowest rank
    assert watch.timed(digits_tables, keep_slower=False) is kept


def test_each_is_measured_once_and_kept_on_the_shelf(stopwatch, hand_timer, digits_tables, monkeypatch):
    timer = hand_timer(by_rank)
    first = stopwatch(timer)
    kept, plan = first.timed(digits_tables, keep_slower=False), {"block2.conv2": digits_tables[-2].spec(1)}
    latency = first.compare(plan)
    assert first.compare(plan) is latency
    assert len(timer.compared) == 1
    assert all(len(lineup) == len(set(lineup)) for lineup in timer.lineups)
    again = stopwatch(timer)
    timer.parts = never
    for ours, theirs in zip(kept, again.timed(digits_tables, keep_slower=False), strict=True):
        np.testing.assert_array_equal(ours.latency, theirs.latency)
    assert again.compare(plan) == latency
    assert again.nanoseconds == first.nanoseconds
    monkeypatch.setattr(module, "_digest_of_code", lambda: "other code")
    for other in (stopwatch(timer), stopwatch(timer, Setting(batch=2)), stopwatch(timer, Setting(threads=2))):
        with pytest.raises(AssertionError, match="measured anew"):
            other.timed(digits_tables, keep_slower=False)


def test_times_of_a_network_are_not_those_of_another_with_the_same_layers(
    stopwatch, hand_timer, digits_model, digits_tables
):
    timer, plan = hand_timer(by_rank), {"block2.conv2": digits_tables[-2].spec(1)}
    first = stopwatch(timer)
    first.timed(digits_tables, keep_slower=False)
    first.compare(plan)
    timer.parts = never
    other = copy.deepcopy(digits_model)
    other.activation = nn.SiLU()
    with pytest.raises(AssertionError, match="measured anew"):
        stopwatch(timer, model=other).compare(plan)
    half = stopwatch(timer, model=copy.deepcopy(digits_model).to(torch.bfloat16))
    with pytest.raises(AssertionError, match="measured anew"):
        half.compare(plan)
    with pytest.raises(AssertionError, match="measured anew"):
        half.timed(digits_tables, keep_slower=False)


def test_what_the_shelf_holds_is_looked_at(stopwatch, hand_timer, tmp_path):
    timer = hand_timer(by_rank)
    stopwatch(timer)._shelf.put = None
    watch = stopwatch(timer)
    assert watch.nanoseconds > 0
    for path in (tmp_path / "shelf").iterdir():
        path.write_bytes(b"?")
    assert stopwatch(timer).nanoseconds == watch.nanoseconds


def test_a_comparison_is_told_as_it_was_measured(stopwatch, hand_timer, digits_tables):
    watch = stopwatch(hand_timer(lambda spec: 0.5), Setting(batch=4, threads=1))
    layer = digits_tables[1]
    latency = watch.compare({layer.name: layer.spec(1)})
    layers = len(digits_tables)
    part = (layers - 0.5) / layers
    assert (latency.dense_ms, latency.compressed_ms) == (layers, layers - 0.5)
    assert (latency.ratio_low, latency.ratio, latency.ratio_high) == pytest.approx((part / 1.25, part, part * 1.25))
    assert (latency.batch, latency.threads) == (4, 1)
    assert (latency.dense_layout, latency.compressed_layout) == ("contiguous", "channels_last")
    assert latency.device.startswith("cpu ")


def test_a_slow_network_has_fewer_sequences_measured(stopwatch, hand_timer, digits_tables, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 0.0)
    monkeypatch.setattr(module, "_AT_A_TIME", 4)
    timer = hand_timer(by_rank)
    kept = stopwatch(timer).timed(digits_tables, keep_slower=True)
    assert len(timer.lineups) <= 1 + 4 + 2 * 4
    assert 1 < max(len(set(layer.sequence)) for layer in kept) <= 4


def test_a_ratio_is_of_lower_quartiles_and_errors_shrink_with_the_runs():
    calm = np.array([[2.0, 1.0]] * 5)
    assert _ratio(calm, calm).value == 0.5
    assert _ratio(calm, calm).error == 0
    disturbed = np.array([[2.0, 1.0], [2.0, 1.0], [9.0, 1.0], [2.0, 8.0], [2.0, 3.0]])
    assert _ratio(disturbed, disturbed).value == 0.5
    few, many = (_ratio(np.tile(disturbed, (n, 1)), np.tile(disturbed, (n, 1))).error for n in (1, 4))
    assert 0 < many < few


def test_a_batch_that_the_network_does_not_take_is_one_line(stopwatch, hand_timer):
    def fails(*args, **options):
        raise RuntimeError("no memory\nat all")

    timer = hand_timer(by_rank)
    watch = stopwatch(timer)
    watch._timer = fails
    with pytest.raises(ModelError, match=r"inputs of shape \(1, 1, 8, 8\) \(no memory\): pass a smaller batch"):
        _ = watch.nanoseconds


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_of_the_cpu_is_timed_by_its_own_time(stopwatch, hand_timer, threads):
    clock = stopwatch(hand_timer(by_rank), Setting(threads=threads))._clock
    assert clock.__name__ == {1: "thread_time", 2: "perf_counter"}[threads]


def test_a_real_machine_measures_all_of_it(digits_model, digits_cost, digits_tables, tmp_path, stopwatch, hand_timer):
    from kronsearch.models.bench import bench
    from kronsearch.models.latency import time_lineups

    watch = stopwatch(hand_timer(by_rank))
    watch._timer, watch._comparer = time_lineups, bench
    threads = torch.get_num_threads()
    small = [layer.take(np.arange(min(len(layer), 6))) for layer in digits_tables]
    found = watch.timed(small, keep_slower=True)
    assert [len(layer) for layer in found] == [len(layer) for layer in small]
    assert all((layer.latency > 0).all() for layer in found)
    assert sum(int(layer.latency[0]) for layer in found) <= watch.nanoseconds
    assert watch.compare({small[1].name: small[1].spec(1)}).ratio > 0
    assert torch.get_num_threads() == threads
