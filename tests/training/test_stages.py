import pytest
import torch
from torch import nn

from kronsearch.sekron import SeKronConv2d, SeKronLinear, SeKronSpec
from kronsearch.training import stages as module
from kronsearch.training.stages import EFFORTS, training_runs

LOW = SeKronSpec(((128, 1, 3, 1), (1, 128, 1, 3)), (16,))


class Network(nn.Module):
    """A wide layer of low rank that is called twice, one of many ranks, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        many = SeKronSpec(((128, 1, 1, 1), (1, 1, 3, 3), (1, 128, 1, 1)), (250, 1))
        self.first = nn.Conv2d(2, 128, 3)
        self.low, self.many, self.idle = (SeKronConv2d.empty(conv, spec) for spec in (LOW, many, LOW))
        self.norm, self.drop = nn.BatchNorm2d(128), nn.Dropout(0.5)
        self.head = SeKronLinear.empty(nn.Linear(128, 3), SeKronSpec(((1, 128), (3, 1)), (2,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.low(self.low(self.first(x)))
        return self.head(self.drop(self.norm(self.many(x))).mean((2, 3)))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_wide_layers_of_low_rank_are_run_in_stages_and_nothing_else_changes(precision):
    network = Network().train()
    network.head.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, random = torch.rand(64, 2, 66, 66), torch.get_rng_state()
    runs = training_runs(network, images, precision)
    assert runs == {"low": ((1,), (0,))}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.low.training
    assert not network.head.training


def test_it_is_told_of_all_positions_of_a_batch(monkeypatch):
    asked = []

    def plan(spec, geometry, positions, effort):
        asked.append((spec, positions, effort))
        return spec

    monkeypatch.setattr(module, "plan_training", plan)
    network = Network()
    assert training_runs(network, torch.rand(5, 2, 66, 34), "float32") == {
        "low": ((1,), (0,)),
        "many": ((2,), (1,), (0,)),
    }
    assert asked == [(LOW, 5 * 16 * 8, EFFORTS["float32"]), (network.many.spec, 5 * 8 * 4, EFFORTS["float32"])]


def test_elsewhere_than_on_cpus_and_without_factors_nothing_is_run():
    assert training_runs(Network(), torch.empty(5, 2, 66, 66, device="meta"), "float32") == {}
    assert training_runs(nn.Linear(2, 2), torch.rand(5, 3), "float32") == {}  # which it can't be run on
