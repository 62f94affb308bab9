"""What is timed inside of a network, by a clock of the test's: how long anything takes is not a test's to say."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kronsearch.models import latency as module
from kronsearch.models.latency import random_layer, random_network, time_lineups
from kronsearch.sekron import SeKronConv2d, SeKronSpec
from kronsearch.sekron.layers import SeKronLayer

THIN, WIDE = (SeKronSpec(((8, 1, 3, 1), (1, 3, 1, 3)), (rank,)) for rank in (1, 3))
HEAD = SeKronSpec(((5, 1), (1, 8)), (2,))
CHEAP, DEAR, BIAS = 1.0, 10.0, 0.25


class Net(nn.Module):
    """Calls its convolution twice, and its head by keyword."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = Head(8, 5)

    def forward(self, x):
        y = self.conv(x) + self.conv(x.flip(0))
        return self.head(rows=y.mean((2, 3)))


class Head(nn.Linear):
    def forward(self, rows):
        return super().forward(rows)


class HandClock:
    """Goes forward by what the test says a layer takes, and writes down what ran."""

    def __init__(self, monkeypatch):
        self.now, self.ran = 0.0, []
        for kind in (nn.Conv2d, SeKronConv2d):
            monkeypatch.setattr(kind, "forward", self._slowed(kind.forward))

    def __call__(self):
        return self.now

    def _slowed(self, forward):
        def slowed(layer, data):
            factorised = isinstance(layer, SeKronLayer)
            self.ran.append(layer.spec.ranks[0] if factorised else "dense")
            self.now += CHEAP * layer.spec.ranks[0] if factorised else DEAR
            return forward(layer, data)

        return slowed


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


INPUTS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_each_layer_is_timed_in_place_by_turns(network, monkeypatch):
    before = copy.deepcopy(network.state_dict())
    clock = HandClock(monkeypatch)
    found = time_lineups(network, [{"conv": THIN}, {"conv": WIDE}], INPUTS, names=["conv"], rounds=3, clock=clock)
    for times, rank in zip(found, (1, 3), strict=True):
        assert times.keys() == {"", "conv"}
        for of_layer in times.values():  # nothing but the two calls of the convolution takes time
            np.testing.assert_array_equal(of_layer, [[2 * DEAR, 2 * CHEAP * rank]] * 3)
    warm_up = ["dense", 1, 3]
    assert clock.ran == [turn for turn in (*warm_up, *["dense", 1, "dense", 3] * 3) for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(network.conv, nn.Conv2d)


def test_what_a_line_up_does_not_name_stays_dense(network, monkeypatch):
    monkeypatch.setattr(Head, "__init__", None)  # nothing is built anew of what is not replaced
    clock = HandClock(monkeypatch)
    (times,) = time_lineups(network, [{}], INPUTS, names=["conv", "head"], rounds=1, clock=clock)
    np.testing.assert_array_equal(times["conv"], [[2 * DEAR, 2 * DEAR]])
    np.testing.assert_array_equal(times["head"], [[0, 0]])


def test_few_line_ups_are_in_memory_at_a_time(network, monkeypatch):
    alive = []

    def build(layer, spec, generator):
        alive.append(spec)
        return random_layer(layer, spec, generator)

    monkeypatch.setattr(module, "random_layer", build)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * THIN.params)
    parts = list(module._parts([{"conv": THIN}] * 5))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [len(part) for part in module._parts([{"conv": WIDE}, {"conv": THIN}])] == [1, 1]
    found = time_lineups(network, [{"conv": THIN}] * 5, INPUTS, names=["conv"], rounds=2)
    assert len(found) == len(alive) == 5


@pytest.mark.parametrize("spec", [THIN, WIDE, SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 3, 1, 1)), (6, 1))])
def test_random_kernels_have_the_variance_of_the_dense_one(network, spec):
    made = [random_layer(network.conv, spec, torch.Generator().manual_seed(seed)) for seed in range(60)]
    variance = np.mean([float(layer.kernel.detach().square().mean()) for layer in made])
    assert variance == pytest.approx(float(network.conv.weight.detach().var(unbiased=False)), rel=0.35)
    assert torch.equal(made[0].bias, network.conv.bias)
    assert not made[0].training


def test_a_random_network_has_the_shapes_of_the_plan_and_is_the_same_each_time(network):
    first, again = (random_network(network, {"conv": WIDE}) for _ in range(2))
    assert first.conv.spec == WIDE
    assert torch.equal(first(INPUTS), again(INPUTS))
    assert torch.equal(first.head.weight, network.head.weight)


def test_images_are_run_in_the_layout_of_the_inputs(network, monkeypatch):
    seen = []
    monkeypatch.setattr(SeKronLayer, "to", lambda layer, **options: seen.append(options) or layer)
    inputs = INPUTS.contiguous(memory_format=torch.channels_last)
    time_lineups(network, [{"conv": THIN}], INPUTS, names=["conv"], rounds=1)
    assert seen == []
    time_lineups(network, [{"conv": THIN}], inputs, names=["conv"], rounds=1)
    assert seen == [{"memory_format": torch.channels_last}]
