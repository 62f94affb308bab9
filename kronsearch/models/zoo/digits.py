"""A small residual network for scikit-learn's 8×8 digits; its trained weights come with the package."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.models.zoo.cifar_resnet import BasicBlock

__all__ = ["DIGITS_WEIGHTS", "DigitsResNet", "digits"]

DIGITS_WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitsResNet(nn.Module):
    """A stem and two residual blocks of 32 and 64 channels for inputs (N, 1, 8, 8)."""

    default_input_shape = (1, 8, 8)

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.block1 = BasicBlock(32, 32)
        self.block2 = BasicBlock(32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.block2(self.block1(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def digits(*, num_classes: int = 10) -> DigitsResNet:
    """Return the untrained network: 75 k parameters, 3 M MACs."""
    return DigitsResNet(num_classes=num_classes)
