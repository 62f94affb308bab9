from collections.abc import Callable

import pytest
import torch
from torch import nn

import kronsearch as ks
from kronsearch.plan import Cost, Decomposition, LayerPlan, ModelIdentity, PlanBudget, Provenance, fingerprint
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.data import TensorData
from kronsearch.training.task import Classification


class Network(nn.Module):
    """Two convolutions, a batch norm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(torch.relu(self.norm(self.conv(x))))
        return self.head(self.drop(x.mean(dim=(2, 3))))


@pytest.fixture(scope="session")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Network().eval()


@pytest.fixture(scope="session")
def make_data() -> Callable[..., TensorData]:
    """Images (N, 2, 6, 5) whose brightness tells the class, in splits of 60, 30 and 30."""

    def make(brightness: int = 0) -> TensorData:
        generator, splits = torch.Generator().manual_seed(7), {}
        for split, count in (("train", 60), ("val", 30), ("test", 30)):
            labels = torch.arange(count) % 3
            noise = torch.randint(60, (count, 2, 6, 5), generator=generator)
            splits[split] = ((noise + brightness + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
        task = Classification(3)
        return TensorData(splits, spec="tiny", seed=0, task=task, mean=(0.4, 0.5), std=(0.2, 0.3), pad=1, flip=True)

    return make


@pytest.fixture(scope="session")
def data(make_data) -> TensorData:
    return make_data()


@pytest.fixture(scope="session")
def plan() -> ks.Plan:
    """Return a plan that replaces a convolution by few terms; its costs are not the network's."""
    layers = {"body.0": LayerPlan(kernel_shape=(8, 8, 3, 3), spec=SeKronSpec(((8, 1, 3, 1), (1, 8, 1, 3)), (3,)))}
    return ks.Plan(
        model=ModelIdentity(spec=None, fingerprint=fingerprint(layers)),
        input_shape=(2, 6, 5),
        budget=PlanBudget(flops="50%", max_macs=10**6),
        dense=Cost(macs=2, params=2),
        compressed=Cost(macs=1, params=1),
        layers=layers,
        decomposition=Decomposition(calibration_images=20, batchnorm_images=20, seed=0),
        predicted_error=0.1,
        provenance=Provenance(versions={}, seed=0),
    )
