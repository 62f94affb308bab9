"""What enters a layer for each of its outputs, on a grid of positions where there are very many."""

import math
import zlib
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.sekron.convolution import conv_geometry
from kronsearch.sekron.layers import Conv

__all__ = ["WIDEST", "Patches", "batched", "groups_of"]

WIDEST = 8192  # entries of an input patch, whose moments would fill the memory beyond
_MOST = 100_000  # of each layer; beyond, a coarser grid of positions is read
_CHUNK = 2**24  # entries of unfolded patches in memory at a time


class Patches:
    """Reads the input patches of one layer, and what it, or its like, puts out at the same positions.

    Args:
        name: of the layer, which alone decides where grids begin: which others are read changes nothing.
        layer: a convolution or a linear layer.
        images: how many there will be in all.
    """

    def __init__(self, name: str, layer: Conv | nn.Linear, images: int) -> None:
        self._layer, self._images = layer, images
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def read(self, data: Tensor, outputs: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield chunks of patches (examples, groups, positions, C·prod(extent)), and of outputs (…, positions, F).

        Args:
            data: what the layer was called with.
            outputs: of such a call.
        """
        if data.numel() == 0:
            return
        if isinstance(self._layer, nn.Linear):
            rows = data.reshape(-1, data.shape[-1])
            step = math.ceil(len(rows) / len(data) * self._images / _MOST)
            kept = slice(self._offset(step, len(rows)), None, step)
            beside = None if outputs is None else outputs.reshape(-1, outputs.shape[-1])[kept][None, None]
            yield rows[kept][None, None], beside
            return
        yield from self._read_convolved(self._layer, batched(self._layer, data), outputs)

    def _read_convolved(
        self, layer: Conv, data: Tensor, outputs: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        geometry, groups = conv_geometry(layer), layer.groups
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        data = F.pad(data, [n for pair in reversed(geometry.padding) for n in pair], mode=mode)
        spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        counts = [(n - span) // s + 1 for n, span, s in zip(data.shape[2:], spans, layer.stride, strict=True)]
        seen = prod(counts) * self._images * groups
        step = math.ceil((seen / _MOST) ** (1 / len(spans)))
        kept, grid = 1, []
        for axis, (span, stride, dilation, count) in enumerate(
            zip(spans, layer.stride, layer.dilation, counts, strict=True)
        ):
            first = self._offset(step, count)
            grid.append(slice(first, None, step))
            kept *= len(range(first, count, step))
            data = data.narrow(2 + axis, first * stride, data.shape[2 + axis] - first * stride)
            data = data.unfold(2 + axis, span, stride * step)[..., ::dilation]
        beside = None if outputs is None else batched(layer, outputs)[(slice(None), slice(None), *grid)]
        examples = max(1, _CHUNK // (groups * layer.weight[0].numel() * kept))
        for start in range(0, len(data), examples):
            chunk = data[start : start + examples]
            patches = chunk.reshape(len(chunk), groups, -1, *chunk.shape[2:]).movedim(2, 2 + len(spans))
            found = None
            if beside is not None:
                own = beside[start : start + examples]
                found = own.reshape(len(own), groups, -1, prod(own.shape[2:])).mT
            yield patches.flatten(-1 - len(spans)).flatten(2, -2), found

    def _offset(self, step: int, count: int) -> int:
        return int(torch.randint(min(step, count), (), generator=self._generator))


def groups_of(layer: Conv | nn.Linear) -> int:
    """Return how many parts of its inputs a layer has kernels of their own for."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def batched(layer: Conv, data: Tensor) -> Tensor:
    """View what enters or leaves a convolution, which may do without a batch, as a batch."""
    return data.reshape(-1, *data.shape[1 - layer.weight.ndim :])
