from collections.abc import Callable

import pytest
import torch
from torch import nn

from kronsearch.training.data import TensorData
from kronsearch.training.task import Classification

CLASSES = 3


class TinyNetwork(nn.Module):
    """Convolution, batch norm, dropout, linear: everything that behaves differently in training."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean(dim=(2, 3))))


@pytest.fixture
def make_network() -> Callable[..., TinyNetwork]:
    def make(seed: int = 0, dropout: float = 0.0) -> TinyNetwork:
        generator = torch.Generator().manual_seed(seed)
        network = TinyNetwork(dropout)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        return network.eval()

    return make


@pytest.fixture
def make_data() -> Callable[..., TensorData]:
    """Images (N, 2, 6, 5) whose brightness tells the class, in splits of 30, 12 and 9."""

    def make(seed: int = 0, pad: int = 1, flip: bool = True) -> TensorData:
        generator = torch.Generator().manual_seed(7)
        splits = {}
        for split, count in (("train", 30), ("val", 12), ("test", 9)):
            labels = torch.arange(count) % CLASSES
            noise = torch.randint(60, (count, 2, 6, 5), generator=generator)
            splits[split] = ((noise + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
        return TensorData(
            splits,
            spec="tiny",
            seed=seed,
            task=Classification(CLASSES),
            mean=(0.4, 0.5),
            std=(0.2, 0.3),
            pad=pad,
            flip=flip,
        )

    return make
