"""What a factorised layer does otherwise in eval mode without gradients: weights formed once, layouts that suit CPUs.

Weights of stages are views of the factors at best. Those whose digits move, or that are merged, are copies, which may
take longer to form than the stages to run; and a convolution of channels-last data copies a weight that is not. So they
are kept until the factors change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.sekron.execution import Stage
from kronsearch.sekron.layout import Layout, Move, View

__all__ = ["Kept", "across", "along", "crosses", "is_channels_last", "may_keep", "moved", "spread"]

RunStage = Callable[[Stage, Tensor, Tensor, Tensor | None, int], Tensor]


def moved(data: Tensor, digits: Move, shape: Sequence[int], lead: Sequence[int], tail: Sequence[int]) -> Tensor:
    """View data as `(*lead, *digits, *tail)`, put the digits into their order, view as `shape`.

    It copies only where something moves.
    """
    if not digits.still:
        start, end = len(lead), len(lead) + len(digits.sizes)
        dims = (*range(start), *(start + digit for digit in digits.order), *range(end, end + len(tail)))
        data = data.reshape((*lead, *digits.sizes, *tail)).permute(dims)
    return data.reshape(tuple(shape))


def may_keep(factors: Sequence[Tensor]) -> bool:
    """Tell whether a layer in eval mode may keep what it forms of these factors.

    Not if gradients are wanted, or there already (an optimiser of torch may change what has some without counting a
    version), nor while the layer is traced, compiled or exported, or has other tensors in the place of its parameters.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    learning = torch.is_grad_enabled()
    for factor in factors:
        if type(factor) is not nn.Parameter or factor.grad is not None or factor.is_inference():
            return False
        if learning and factor.requires_grad:
            return False
    return True


@dataclass(frozen=True, eq=False)
class Kept:
    """Weights, and the factors that they were formed of, as those were then.

    Args:
        weights: of the stages.
        layout: for which they were formed.
        factors: the parameters.
        seen: the same memory, which can't become another tensor's while it is held here.
        versions: how often each had been changed in place.
    """

    weights: tuple[Tensor, ...]
    layout: Layout
    factors: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, factors: Sequence[Tensor], layout: Layout, form: Callable[[], Sequence[Tensor]]) -> Self:
        """Form the weights and keep them; they can be used in any mode afterwards."""
        versions, seen = tuple(factor._version for factor in factors), tuple(factor.detach() for factor in factors)
        with torch.inference_mode(False), torch.no_grad():
            return cls(tuple(form()), layout, tuple(factors), seen, versions)

    def fit(self, factors: Sequence[Tensor], layout: Layout) -> bool:
        """Tell whether they are the weights of these factors, as they are now, for this layout."""
        if layout is not self.layout:
            return False
        for factor, known, seen, version in zip(factors, self.factors, self.seen, self.versions, strict=True):
            if factor is not known or factor._version != version or not factor.is_set_to(seen):
                return False
        return True


def is_channels_last(data: Tensor) -> bool:
    """Tell whether the channels of images (examples, channels, height, width) lie side by side in memory."""
    return data.ndim == 4 and data.stride(1) == 1 and data.shape[1] > 1 and data.shape[2] * data.shape[3] > 1


def spread(stage: Stage, view: View, weight: Tensor) -> Tensor:
    """Return a stage's weight as `along` takes it: for each digit in front of the channels again, channels last."""
    if view.front > 1 and not _is_product(stage):
        weight = weight.repeat(view.front, *(1,) * (weight.ndim - 1))
    return weight.contiguous(memory_format=torch.channels_last)


def _is_product(stage: Stage) -> bool:
    return stage.pointwise and stage.groups == 1


def along(
    data: Tensor, stages: Sequence[Stage], layout: Layout, weights: Sequence[Tensor], bias: Tensor | None, run: RunStage
) -> Tensor:
    """Run all stages on channels-last images, which they stay: digits in front of a stage's channels are more groups.

    Args:
        data: (examples, in channels, height, width), the channels side by side in memory.
        stages: of the layer.
        layout: of the stages, for channels that are last.
        weights: of the stages, `spread`.
        bias: for the last stage.
        run: runs one stage, in so many times its groups.
    """
    last = stages[-1]
    for stage, view, weight in zip(stages, layout.views, weights, strict=True):
        if not (view.ready or view.data.still):
            data = _rows_moved(data, view.data)
        own = bias if stage is last else None
        if view.front > 1 and _is_product(stage):
            rows = data.permute(0, 2, 3, 1)
            rows = rows.reshape(*rows.shape[:3], view.front, stage.group_in)
            data = F.linear(rows, weight.flatten(1), own).flatten(3).permute(0, 3, 1, 2)
        else:
            data = run(stage, data, weight, own, view.front)
    return data if layout.ready or layout.outputs.still else _rows_moved(data, layout.outputs)


def _rows_moved(data: Tensor, digits: Move) -> Tensor:
    rows = data.permute(0, 2, 3, 1)
    return moved(rows, digits, rows.shape, rows.shape[:-1], ()).permute(0, 3, 1, 2)


def crosses(stages: Sequence[Stage], layout: Layout) -> bool:
    """Tell whether a layer can run by `across`: convolutions between two products of matrices, and nothing moves."""
    first, last = stages[0], stages[-1]
    ready = layout.ready and all(view.ready for view in layout.views)
    return len(stages) > 2 and _is_product(first) and _is_product(last) and ready


def across(
    data: Tensor, stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None, run: RunStage
) -> Tensor:
    """Run all stages on contiguous images, those in between with channels last.

    The first product leaves them so, and the last takes them back, at no cost. For the convolutions in between it is
    another thing: a depthwise one of channels-last data takes half the time or less on CPUs.

    Args:
        data: (examples, in channels, height, width).
        stages: of a layer that `crosses`.
        weights: of the stages, channels last.
        bias: (out channels,), or none.
        run: runs one stage, in so many times its groups.
    """
    examples, _, height, width = data.shape
    rows = torch.bmm(data.flatten(2).transpose(1, 2), weights[0].flatten(1).T.expand(examples, -1, -1))
    data = rows.reshape(examples, height, width, rows.shape[2]).permute(0, 3, 1, 2)
    for stage, weight in zip(stages[1:-1], weights[1:-1], strict=True):
        data = run(stage, data, weight, None, 1)
    height, width = data.shape[2:]
    rows = data.permute(0, 2, 3, 1).flatten(1, 2)
    images = torch.bmm(weights[-1].flatten(1).expand(examples, -1, -1), rows.transpose(1, 2))
    if bias is not None:
        images = images + bias.to(images.dtype)[:, None]
    return images.reshape(examples, images.shape[1], height, width)
