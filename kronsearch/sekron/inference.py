"""What a factorised layer does otherwise in eval mode without gradients: weights formed once, layouts that suit CPUs.

Weights of stages are views of the factors at best. Those whose digits move, or that are merged, are copies, which may
take longer to form than the stages to run; and a convolution of channels-last data copies a weight that is not. So they
are kept until the factors change; of images, as steps that nothing has to be asked of any more, for a small layer's
convolutions take no longer than some tens of lines of Python do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.sekron.execution import Stage
from kronsearch.sekron.layout import Layout, Move

__all__ = ["Kept", "Step", "across", "along", "crosses", "is_channels_last", "may_keep", "moved"]

Step = Callable[[Tensor], Tensor]


def moved(data: Tensor, digits: Move, shape: Sequence[int], lead: Sequence[int], tail: Sequence[int]) -> Tensor:
    """View data as `(*lead, *digits, *tail)`, put the digits into their order, view as `shape`.

    It copies only where something moves.
    """
    if not digits.still:
        start, end = len(lead), len(lead) + len(digits.sizes)
        dims = (*range(start), *(start + digit for digit in digits.order), *range(end, end + len(tail)))
        data = data.reshape((*lead, *digits.sizes, *tail)).permute(dims)
    return data.reshape(tuple(shape))


def may_keep(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a layer in eval mode may keep what it forms of these parameters.

    Not if gradients are wanted, or there already (an optimiser of torch may change what has some without counting a
    version), nor while the layer is traced, compiled or exported, or has other tensors in the place of its parameters.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    learning = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.grad is not None or tensor.is_inference():
            return False
        if learning and tensor.requires_grad:
            return False
    return True


@dataclass(frozen=True, eq=False)
class Kept:
    """What was formed of tensors, and those tensors as they were then.

    Args:
        formed: weights of stages, or the steps that run them.
        way: for which it was formed.
        tensors: the parameters.
        seen: the same memory, which can't become another tensor's while it is held here.
        versions: how often each had been changed in place.
    """

    formed: tuple[Any, ...]
    way: object
    tensors: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], way: object, form: Callable[[], Sequence[Any]]) -> Self:
        """Form something and keep it; it can be used in any mode afterwards."""
        versions, seen = tuple(tensor._version for tensor in tensors), tuple(tensor.detach() for tensor in tensors)
        with torch.inference_mode(False), torch.no_grad():
            return cls(tuple(form()), way, tuple(tensors), seen, versions)

    def fit(self, tensors: Sequence[Tensor], way: object) -> bool:
        """Tell whether it was formed of these tensors, as they are now, for this way."""
        if way != self.way or len(tensors) != len(self.tensors):
            return False
        for tensor, known, seen, version in zip(tensors, self.tensors, self.seen, self.versions, strict=True):
            if tensor is not known or tensor._version != version or not tensor.is_set_to(seen):
                return False
        return True


def is_channels_last(data: Tensor) -> bool:
    """Tell whether the channels of images (examples, channels, height, width) lie side by side in memory."""
    return data.ndim == 4 and data.stride(1) == 1 and data.shape[1] > 1 and data.shape[2] * data.shape[3] > 1


def along(stages: Sequence[Stage], layout: Layout, weights: Sequence[Tensor], bias: Tensor | None) -> Iterator[Step]:
    """Yield the steps of all stages on channels-last images, which they stay.

    Digits in front of a stage's channels are more groups, or more rows of a product. A 1x1 convolution is one product
    of matrices: torch's convolution copies its weight into another layout at each call, which takes as long again where
    positions are few (512 channels at 7 x 7 with two threads: 0.96 ms, the product 0.63 ms).

    Args:
        stages: of the layer.
        layout: of the stages, for channels that are last.
        weights: of the stages.
        bias: for the last stage.
    """
    for stage, view, weight in zip(stages, layout.views, weights, strict=True):
        if not (view.ready or view.data.still):
            yield _moving(view.data)
        own = bias if stage is stages[-1] else None
        if stage.product:
            yield _product(weight.flatten(1), own, view.front, stage.group_in)
        else:
            yield _convolution(stage, weight.repeat(view.front, 1, 1, 1) if view.front > 1 else weight, own, view.front)
    if not (layout.ready or layout.outputs.still):
        yield _moving(layout.outputs)


def _moving(digits: Move) -> Step:
    def run(data: Tensor) -> Tensor:
        rows = data.permute(0, 2, 3, 1)
        return moved(rows, digits, rows.shape, rows.shape[:-1], ()).permute(0, 3, 1, 2)

    return run


def _product(weight: Tensor, bias: Tensor | None, front: int, channels: int) -> Step:
    weight = weight.T.contiguous().T  # few rows times a matrix that lies so in memory take 0.8 of the time, many 0.95

    def run(data: Tensor) -> Tensor:
        return F.linear(data.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def run_split(data: Tensor) -> Tensor:
        rows = data.permute(0, 2, 3, 1)
        rows = rows.reshape(*rows.shape[:3], front, channels)
        return F.linear(rows, weight, bias).flatten(3).permute(0, 3, 1, 2)

    return run_split if front > 1 else run


def _convolution(stage: Stage, weight: Tensor, bias: Tensor | None, times: int = 1) -> Step:
    geometry, groups = stage.geometry, times * stage.groups
    stride, padding, dilation = geometry.stride, geometry.padding_inside, geometry.dilation
    weight = weight.contiguous(memory_format=torch.channels_last)  # or it would be copied at each call

    def run(data: Tensor) -> Tensor:
        return F.conv2d(data, weight, bias, stride, padding, dilation, groups)

    return run


def crosses(stages: Sequence[Stage], layout: Layout) -> bool:
    """Tell whether a layer can run by `across`: convolutions between two products of matrices, and nothing moves."""
    first, last = stages[0], stages[-1]
    ready = layout.ready and all(view.ready for view in layout.views)
    return len(stages) > 2 and first.product and last.product and ready


def across(stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None) -> Iterator[Step]:
    """Yield the steps of all stages on contiguous images, those in between with channels last.

    The first product leaves them so, and the last takes them back, at no cost. For the convolutions in between it is
    another thing: a depthwise one of channels-last data takes half the time or less on CPUs.

    Args:
        stages: of a layer that `crosses`.
        weights: of the stages.
        bias: (out channels,), or none.
    """
    first, last = weights[0].flatten(1).T.contiguous(), weights[-1].flatten(1).contiguous()

    def enter(data: Tensor) -> Tensor:
        examples, _, height, width = data.shape
        rows = torch.bmm(data.flatten(2).transpose(1, 2), first.expand(examples, -1, -1))
        return rows.reshape(examples, height, width, rows.shape[2]).permute(0, 3, 1, 2)

    def leave(data: Tensor) -> Tensor:
        examples, _, height, width = data.shape
        rows = data.permute(0, 2, 3, 1).flatten(1, 2)
        images = torch.bmm(last.expand(examples, -1, -1), rows.transpose(1, 2))
        if bias is not None:
            images = images + bias.to(images.dtype)[:, None]
        return images.reshape(examples, images.shape[1], height, width)

    yield enter
    for stage, weight in zip(stages[1:-1], weights[1:-1], strict=True):
        yield _convolution(stage, weight, None)
    yield leave
