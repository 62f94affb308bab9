"""The three-stage residual networks for 32×32 images of He et al. (2016), section 4.2.

Parameter names are those of the widely published checkpoints (github.com/akamaster/pytorch_resnet_cifar10), so these
load as they are.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
]


class PaddedShortcut(nn.Module):
    """The shortcut without parameters (option A): every `stride`-th pixel, new channels filled with zeros.

    Maps (N, C, H, W) to (N, C + `new_channels`, ⌈H/stride⌉, ⌈W/stride⌉), half of the new channels on either side.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the strided and padded input."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm around an identity or padded shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = PaddedShortcut(channels - in_channels, stride) if changes_shape else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network of three stages with 16, 32 and 64 channels for inputs (N, 3, 32, 32).

    `blocks_per_stage` = n makes 6n + 2 layers; `num_classes` is the width of the output.
    """

    default_input_shape = (3, 32, 32)

    def __init__(self, blocks_per_stage: int, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def cifar_resnet20(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 M MACs."""
    return CifarResNet(3, num_classes=num_classes)


def cifar_resnet32(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-32: 0.47 M parameters, 70 M MACs."""
    return CifarResNet(5, num_classes=num_classes)


def cifar_resnet44(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-44: 0.66 M parameters, 98 M MACs."""
    return CifarResNet(7, num_classes=num_classes)


def cifar_resnet56(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 0.86 M parameters, 127 M MACs."""
    return CifarResNet(9, num_classes=num_classes)


def cifar_resnet110(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-110: 1.73 M parameters, 255 M MACs."""
    return CifarResNet(18, num_classes=num_classes)
