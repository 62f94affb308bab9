"""What is timed, in which order, and what is put back; how long anything takes is not a test's to say."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import kronsearch as ks
from kronsearch.errors import FileError, ModelError, StudyError
from kronsearch.models import bench as module
from kronsearch.models import timing
from kronsearch.models.bench import Timing, bench, save_timings
from kronsearch.sekron import SeKronConv2d, SeKronLinear, SeKronSpec

CPU = torch.device("cpu")
SHAPE = (3, 6, 6)
CONV = SeKronSpec(((8, 1, 3, 1), (1, 3, 1, 3)), (2,))
HEAD = SeKronSpec(((5, 1), (1, 8)), (2,))


class Net(nn.Module):
    """Calls its convolution twice, and its head by keyword."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.conv(x) + self.conv(x.flip(0))
        return self.head(input=y.mean((2, 3)))


class Head(SeKronLinear):
    def forward(self, input):  # noqa: A002
        return super().forward(input)


@pytest.fixture
def networks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = Net()
    small = copy.deepcopy(dense)
    small.conv = SeKronConv2d.from_conv(dense.conv, CONV)
    small.head = Head.from_linear(dense.head, HEAD)
    return dense, small


def timed(networks, **options):
    return bench(*networks, **{"input_shape": SHAPE, "seconds": 1e-3, **options})


def test_the_network_and_each_replaced_layer_at_each_setting(networks):
    timings = timed(networks, batches=(1, 3), threads=(1, 2))
    assert [(t.threads, t.batch, t.layer) for t in timings] == [
        (threads, batch, layer) for threads in (1, 2) for batch in (1, 3) for layer in ("", "conv", "head")
    ]
    for found in timings:
        assert found.pairs >= 5
        assert min(found.dense_ms, found.compressed_ms) > 0
        assert found.speedup_low <= found.speedup <= found.speedup_high
        assert {found.dense_layout, found.compressed_layout} <= {"contiguous", "channels_last"}
        sizes = [sum(p.nbytes for p in network.parameters()) for network in networks]
        if found.layer:
            assert found.dense_bytes is found.compressed_bytes is None
        else:  # the outputs of two convolutions, at the least
            outputs = 2 * found.batch * 8 * 36 * 4
            assert found.dense_bytes >= sizes[0] + outputs
            assert found.compressed_bytes >= sizes[1] + outputs
    assert [t.layer for t in timed(networks, layers=False, batches=(1, 2))] == ["", ""]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_modes_and_gradients_are_as_before(networks, fails):
    before = torch.get_num_threads()
    seen = []

    def watch(network, args):
        seen.append((torch.get_num_threads(), network.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("no memory\nat all")

    for network in networks:
        network.train()
        network.register_forward_pre_hook(watch)
    states = [copy.deepcopy(network.state_dict()) for network in networks]
    if fails:
        with pytest.raises(ModelError, match=r"inputs of shape \(1, 3, 6, 6\) \(no memory\): pass a smaller batch"):
            timed(networks, threads=(before + 1,))
    else:
        timed(networks, threads=(before + 1,))
    assert set(seen) == {(before + 1, False, False)}
    assert torch.get_num_threads() == before
    for network, state in zip(networks, states, strict=True):
        assert network.training
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert not network.conv._forward_pre_hooks


def test_runs_take_turns_after_a_warm_up():
    order = []
    times = timing.paired(lambda: order.append("dense"), lambda: order.append("compressed"), 0.0, CPU)
    assert times.shape == (timing._FEWEST, 2)
    assert order == ["dense", "compressed"] * (timing._WARMUP + timing._FEWEST)


def test_time_is_bounded():
    ticks = iter(range(10_000))

    def clock():
        return float(next(ticks))

    # a look at the clock takes a second: four for a pair, and one more before each pair after the fewest
    seconds, fewest = 1 + 4 * timing._FEWEST + 5 * 6, timing._FEWEST
    assert len(timing.paired(lambda: None, lambda: None, seconds - 1, CPU, clock=clock)) == fewest + 6
    assert len(timing.paired(lambda: None, lambda: None, seconds, CPU, clock=clock)) == fewest + 6


def test_the_summary_is_of_pairs():
    dense, compressed = np.array([2.0, 4.0, 9.0, 8.0, 5.0]), np.array([1.0, 1.0, 3.0, 8.0, 2.0])
    summary = module._summary(np.stack([dense, compressed], axis=1))
    assert summary["dense_ms"] == 1e3 * 5
    assert summary["compressed_ms"] == 1e3 * 2
    assert (summary["speedup_low"], summary["speedup"], summary["speedup_high"]) == (2.0, 2.5, 3.0)
    assert summary["pairs"] == 5


def test_a_layer_is_run_on_the_inputs_of_all_its_calls(networks):
    dense, _ = networks
    inputs = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    calls = module._calls(dense, ["conv", "head"], lambda: dense(inputs))
    outputs = calls["conv"]()
    assert [torch.equal(y, dense.conv(x)) for x, y in zip((inputs, inputs.flip(0)), outputs, strict=True)] == [True] * 2
    assert torch.equal(calls["head"]()[0], dense(inputs))


def test_each_network_is_timed_in_the_layout_that_it_is_faster_in(networks, monkeypatch):
    slow = {"contiguous"}

    def paired(first, second, seconds, device, *, clock):
        return np.array([[2.0, 1.0]]) if slow else np.array([[1.0, 2.0]])

    monkeypatch.setattr(timing, "paired", paired)
    monkeypatch.setattr(module, "paired", paired)
    assert {t.dense_layout for t in timed(networks)} == {"channels_last"}
    slow.clear()
    assert {t.compressed_layout for t in timed(networks)} == {"contiguous"}


def test_what_is_no_image_has_one_layout():
    dense = nn.Sequential(nn.Linear(8, 5))
    small = nn.Sequential(SeKronLinear.from_linear(dense[0], HEAD))
    whole, layer = timed((dense, small), input_shape=(8,))
    assert whole.dense_layout == whole.compressed_layout == "contiguous"
    assert layer.layer == "0"


def test_a_volume_has_one_layout():
    dense = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 8, 5))
    small = copy.deepcopy(dense)
    small[2] = SeKronLinear.from_linear(dense[2], SeKronSpec(((5, 1), (1, 16)), (2,)))
    assert timed((dense, small), input_shape=(1, 2, 2, 2))[0].dense_layout == "contiguous"


def test_a_network_without_a_factorised_layer_is_refused(networks):
    with pytest.raises(ModelError, match="no layer of the compressed network is factorised"):
        timed((networks[0], networks[0]))


def test_a_shape_that_the_network_does_not_take_is_one_line(networks):
    with pytest.raises(ModelError, match=r"can't run on inputs of shape \(1, 4, 6, 6\)"):
        timed(networks, input_shape=(4, 6, 6))


@pytest.mark.parametrize("asked", [{"batches": (1, 0)}, {"threads": (0,)}])
def test_runs_of_nothing_are_refused(networks, asked):
    with pytest.raises(StudyError, match="0 is asked for: ask for a whole number above zero"):
        bench(*networks, input_shape=SHAPE, **asked)


def test_timings_are_written_whole(tmp_path):
    timings = [
        Timing(layer, 1, 2, 3.0, 2.0, 1.5, 1.25, 1.75, 9, "contiguous", "channels_last", 8, 7) for layer in ("", "a.b")
    ]
    save_timings(timings, tmp_path / "new" / "t.csv")
    table = pd.read_csv(tmp_path / "new" / "t.csv", keep_default_na=False)
    assert [Timing(**row) for row in table.to_dict("records")] == timings
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="can't write"):
        save_timings(timings, tmp_path / "file" / "t.csv")


def test_the_package_offers_it():
    assert ks.bench is bench
