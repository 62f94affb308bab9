import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronsearch.sekron import SeKronConv2d, SeKronLinear, SeKronSpec
from kronsearch.training import stages as module
from kronsearch.training.stages import AVX2, PRICES, step_prices, training_runs

LOW = SeKronSpec(((128, 1, 3, 1), (1, 128, 1, 3)), (16,))
MANY = SeKronSpec(((128, 1, 1, 1), (1, 1, 3, 3), (1, 128, 1, 1)), (250, 1))


class Network(nn.Module):
    """A wide layer of low rank that is called twice, one of many ranks, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.first = nn.Conv2d(2, 128, 3)
        self.low, self.many, self.idle = (SeKronConv2d.empty(conv, spec) for spec in (LOW, MANY, LOW))
        self.norm = nn.BatchNorm2d(128)
        self.head = SeKronLinear.empty(nn.Linear(128, 3), SeKronSpec(((1, 128), (3, 1)), (2,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.low(self.low(self.first(x))))  # in eval mode too
        return self.head(self.norm(self.many(x)).mean((2, 3)))


class Films(Network):
    """The same for each picture of a film (examples, pictures, channels, height, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


@pytest.fixture
def asked(monkeypatch):
    """What the planner is asked, which leaves every layer as its spec has it."""
    found = []

    def plan(spec, geometry, positions, prices):
        found.append((spec, positions, prices))
        return spec

    monkeypatch.setattr(module, "plan_training", plan)
    return found


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_wide_layers_of_low_rank_are_run_in_stages_and_nothing_else_changes(precision):
    network = Network().train()
    network.head.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, random = torch.rand(1, 2, 66, 66), torch.get_rng_state()
    assert training_runs(network, images, 64, precision) == {"low": ((1,), (0,))}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(layer._forward_hooks for layer in network.modules())
    assert network.low.training
    assert not network.head.training


def test_all_positions_of_all_calls_and_examples_count(asked):
    runs = training_runs(Network(), torch.rand(3, 2, 66, 34), 5, "float32")
    assert runs == {"low": ((1,), (0,)), "many": ((2,), (1,), (0,))}
    positions = [5 * (32 * 16 + 16 * 8), 5 * 8 * 4]
    assert asked == [(spec, count, step_prices("float32")) for spec, count in zip((LOW, MANY), positions, strict=True)]


@pytest.mark.parametrize(
    ("capability", "precision", "prices"),
    [
        ("AVX2", "float32", AVX2),
        ("AVX2", "bf16", PRICES["bf16"]),
        ("AVX512", "float32", PRICES["float32"]),
        ("AVX512", "bf16", PRICES["bf16"]),
        ("DEFAULT", "float32", PRICES["float32"]),
    ],
)
def test_prices_are_those_of_the_processor(monkeypatch, capability, precision, prices):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert step_prices(precision) == prices


def test_so_do_those_of_all_pictures_that_an_example_has(asked):
    training_runs(Films(), torch.rand(3, 7, 2, 66, 34), 5, "bf16")
    assert [count for _, count, _ in asked] == [7 * 5 * (32 * 16 + 16 * 8), 7 * 5 * 8 * 4]


def test_elsewhere_than_on_cpus_and_without_factors_nothing_is_run():
    assert training_runs(Network(), torch.empty(5, 2, 66, 66, device="meta"), 5, "float32") == {}
    assert training_runs(nn.Linear(2, 2), torch.rand(5, 3), 5, "float32") == {}  # which it can't be run on
