"""Which sequences of factor shapes a kernel has. Ints only."""

from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from itertools import product
from math import prod

__all__ = [
    "FactorShape",
    "FactorShapes",
    "Structure",
    "cp_sequence",
    "divisors",
    "factor_pairs",
    "holds_groups",
    "structure_of",
]

FactorShape = tuple[int, ...]
FactorShapes = tuple[FactorShape, ...]


class Structure(StrEnum):
    """The kinds of structure that a sequence can have, by what its factors share."""

    DENSE = "dense"
    """One factor: the kernel as it is."""
    BOTTLENECK = "bottleneck"
    """Two factors, one with all out channels, the other with all in channels; the kernel's extent is in one of them."""
    SPATIAL = "spatial"
    """As a bottleneck, and the kernel's extent is divided between the two."""
    MIXING = "mixing"
    """Two factors that both mix channels: a Kronecker sum, which keeps the full matrix rank."""
    DEEP = "deep"
    """Three factors or more."""


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors of a positive int, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def factor_pairs(kernel_shape: FactorShape) -> Iterator[FactorShapes]:
    """All ordered sequences of two factor shapes, the two that hold a whole kernel in one factor left out.

    A mode of extent n is divided as (d, n / d) for every divisor d of n, so that there are as many sequences as the
    product of the modes' numbers of divisors, less two.
    """
    ones = (1,) * len(kernel_shape)
    for first in product(*map(divisors, kernel_shape)):
        second = tuple(n // d for n, d in zip(kernel_shape, first, strict=True))
        if first != ones and second != ones:
            yield first, second


def cp_sequence(kernel_shape: FactorShape) -> FactorShapes | None:
    """Return the sequence of three factors (out channels)(extent)(in channels), None where one of them has one entry.

    With ranks (R, 1) it is a CP decomposition on those three modes (Lebedev et al., 2015), and runs as a 1×1, a
    depthwise and a 1×1 convolution.
    """
    out_channels, in_channels, *extent = kernel_shape
    if 1 in (out_channels, in_channels, prod(extent)):
        return None
    ones = (1,) * len(extent)
    return (out_channels, 1, *ones), (1, 1, *extent), (1, in_channels, *ones)


def holds_groups(factor_shapes: FactorShapes, groups: int) -> bool:
    """Tell whether a grouped layer can have a sequence: its groups are the most significant digit of the out channels.

    They belong to the first factor, whose out channels they must divide.
    """
    return factor_shapes[0][0] % groups == 0


def structure_of(factor_shapes: FactorShapes) -> Structure:
    """Return the kind of structure of a sequence of factor shapes, each (out channels, in channels, *extent)."""
    if len(factor_shapes) == 1:
        return Structure.DENSE
    if len(factor_shapes) > 2:
        return Structure.DEEP
    first, second = factor_shapes
    separate = (first[0] == 1 and second[1] == 1) or (first[1] == 1 and second[0] == 1)
    if not separate:
        return Structure.MIXING
    split = prod(first[2:]) > 1 and prod(second[2:]) > 1
    return Structure.SPATIAL if split else Structure.BOTTLENECK
