"""Kernels of factors formed for training, those of many layers at once.

A training step forms every kernel once, and takes its gradient back to the factors once: what that costs comes on top
of the dense network's step, and for small kernels it is the number of operations that costs. `reconstruct` takes two
dozen for a kernel, there and back. Most layers of a network are single sums of Kronecker products, of two factors or of
three (CP), whose factors have the same shapes but for the rank: three products of matrices for each kernel, the rest
once for all of them. The gradients of CP are those of alternating least squares (Kolda and Bader, 2009, section 3.4).
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kronsearch.sekron.shapes import FactorShapes
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import reconstruct

__all__ = ["form_kernels", "rounded"]


def form_kernels(
    specs: Sequence[SeKronSpec], factors: Sequence[Sequence[Tensor]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return the kernels of many layers, formed in their factors' own precision, inside of autocast too.

    Differentiable once, all together: the factors of a kernel that nothing was done with get gradients of zeros. Those
    for images lie in memory with their channels last, as convolutions want them.

    Args:
        specs: of the layers.
        factors: of each layer.
        dtype: what kernels of float32 are rounded to once they are formed; None leaves them as they are. It is what
            autocast would do to each of them, there and back.
    """
    kernels: list[Tensor | None] = [None] * len(specs)
    groups: dict[Any, list[int]] = defaultdict(list)
    for k, (spec, own) in enumerate(zip(specs, factors, strict=True)):
        if _is_single_sum(spec):
            groups[spec.factor_shapes, own[0].dtype, own[0].device].append(k)
        else:
            with torch.autocast(own[0].device.type, enabled=False):
                kernel = reconstruct(own, spec)
                kernels[k] = kernel.to(rounded(kernel.dtype, dtype))
    for (shapes, own, _), members in groups.items():
        plan, ranks = _plan(shapes), [specs[k].ranks[0] for k in members]
        formed = _Formed.apply(
            plan, ranks, rounded(own, dtype), *(factors[k][place] for place in plan.places for k in members)
        )
        for k, kernel in zip(members, formed, strict=True):
            kernels[k] = kernel
    return [kernel for kernel in kernels if kernel is not None]


def rounded(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return what a weight of one type is rounded to: only float32 is, and only if that is wanted."""
    return wanted if wanted is not None and own == torch.float32 else own


def _is_single_sum(spec: SeKronSpec) -> bool:
    """Tell whether the kernel is one sum of Kronecker products of two or three factors."""
    return spec.coupling == "tree" and spec.sequence_length in (2, 3) and all(rank == 1 for rank in spec.ranks[1:])


class _Plan(NamedTuple):
    """How the kernels of some factor shapes are formed: as a factor's product with the Khatri-Rao product of the rest.

    Args:
        places: of the factors, in the order in which they are multiplied.
        sizes: the entries of each, in that order.
        by_factor: the product's digits, those of a factor side by side.
        by_memory: the same digits as they lie in the kernel's memory.
        to_memory: from the first order to the second, both with a dimension for the layers in front.
        to_factors: the way back.
        memory: the kernel's extents as they lie in memory.
        to_modes: from the order in memory to that of the modes, with a dimension for the layers.
        order: of the modes in memory.
    """

    places: tuple[int, ...]
    sizes: tuple[int, ...]
    by_factor: tuple[int, ...]
    by_memory: tuple[int, ...]
    to_memory: tuple[int, ...]
    to_factors: tuple[int, ...]
    memory: tuple[int, ...]
    to_modes: tuple[int, ...]
    order: tuple[int, ...]


@lru_cache(maxsize=2**10)
def _plan(shapes: FactorShapes) -> _Plan:
    modes = len(shapes[0])
    order = (0, 2, 3, 1) if modes == 4 else tuple(range(modes))
    first = max(range(len(shapes)), key=lambda k: shapes[k][0])  # the out channels come first in memory too
    places = (first, *(k for k in range(len(shapes)) if k != first))
    digits = [(k, mode) for k in places for mode in range(modes)]
    lying = sorted(digits, key=lambda digit: (order.index(digit[1]), digit[0]))
    return _Plan(
        places=places,
        sizes=tuple(prod(shapes[k]) for k in places),
        by_factor=tuple(shapes[k][mode] for k, mode in digits),
        by_memory=tuple(shapes[k][mode] for k, mode in lying),
        to_memory=(0, *(1 + digits.index(digit) for digit in lying)),
        to_factors=(0, *(1 + lying.index(digit) for digit in digits)),
        memory=tuple(prod(shape[mode] for shape in shapes) for mode in order),
        to_modes=(0, *(1 + order.index(mode) for mode in range(modes))),
        order=order,
    )


class _Formed(torch.autograd.Function):
    """The kernels of layers whose factors have the same shapes but for the ranks.

    Products of matrices are given an `out`, which autocast leaves alone.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, ranks: list[int], dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        count = len(ranks)
        parts = [factors[start : start + count] for start in range(0, len(factors), count)]
        left, *rest = (torch.cat(part).reshape(-1, size) for part, size in zip(parts, plan.sizes, strict=True))
        right = rest[0] if len(rest) == 1 else (rest[0][:, :, None] * rest[1][:, None, :]).flatten(1)
        product = left.new_empty(count, left.shape[1], right.shape[1])
        for a, b, out in zip(torch.split(left, ranks), torch.split(right, ranks), product.unbind(), strict=True):
            torch.mm(a.T, b, out=out)
        ctx.plan, ctx.ranks, ctx.tails = plan, ranks, [part[0].shape[1:] for part in parts]
        ctx.save_for_backward(left, right, *rest)
        digits = product.view(count, *plan.by_factor).permute(plan.to_memory)
        lying = torch.empty(digits.shape, dtype=dtype, device=left.device).copy_(digits)
        return lying.view(count, *plan.memory).permute(plan.to_modes).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        plan, ranks = ctx.plan, ctx.ranks
        left, right, *rest = ctx.saved_tensors
        lying = torch.stack([gradient.permute(plan.order) for gradient in gradients])
        digits = lying.view(-1, *plan.by_memory).permute(plan.to_factors)
        kernels = left.new_empty(digits.shape).copy_(digits).view(len(ranks), left.shape[1], -1)
        found, towards = [torch.empty_like(left)], torch.empty_like(right)
        parts = (torch.split(matrix, ranks) for matrix in (left, right, found[0], towards))
        for a, b, to_a, to_b, kernel in zip(*parts, kernels.unbind(), strict=True):
            torch.mm(b, kernel.T, out=to_a)
            torch.mm(a, kernel, out=to_b)
        if len(rest) == 1:
            found.append(towards)
        else:
            one, two = rest
            terms = towards.view(-1, *plan.sizes[1:])
            # one row in front: with one column behind it takes five times as long (MKL, AVX2)
            for row, matrix in ((two, terms.transpose(1, 2)), (one, terms)):
                found.append(torch.bmm(row[:, None, :], matrix, out=row.new_empty(len(row), 1, matrix.shape[2])))
        whole = (torch.split(matrix.view(-1, *tail), ranks) for matrix, tail in zip(found, ctx.tails, strict=True))
        return None, None, None, *(factor for part in whole for factor in part)
