"""The kernels that can be decomposed, and the unit that each is decomposed in."""

import math

import torch
from torch import Tensor

from kronsearch.errors import SpecError

__all__ = ["in_units", "power_of_two"]

_FARTHEST = 100  # powers of two; single precision has 126


def in_units(kernel: Tensor) -> tuple[Tensor, float]:
    """Return a kernel divided by a power of two that is near the root mean square of its entries, and that number.

    Squares of very small or large entries are beyond what single precision can hold, and a descent that knows no
    unit takes other steps in each.

    Raises:
        SpecError: the kernel is not of real floating-point numbers, all of them finite.
    """
    if not kernel.is_floating_point():
        kind = str(kernel.dtype).removeprefix("torch.")
        raise SpecError(f"the kernel is {kind}: only kernels of real floating-point numbers can be decomposed")
    if kernel.is_meta:
        raise SpecError("the kernel is on the meta device, where it has no entries: load it first")
    if not bool(kernel.isfinite().all()):
        raise SpecError("the kernel has entries that are not finite: it can't be decomposed")
    kernel = kernel.detach()
    unit = power_of_two(float(torch.linalg.vector_norm(kernel, dtype=torch.float64)) / math.sqrt(kernel.numel() or 1))
    return kernel / unit, unit


def power_of_two(size: float) -> float:
    """Return the power of two nearest to a positive size, or as near as single precision has it; 1 if there is none."""
    if not (math.isfinite(size) and size > 0):
        return 1.0
    return 2.0 ** min(max(round(math.log2(size)), -_FARTHEST), _FARTHEST)
