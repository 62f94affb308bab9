"""`SeKronSpec`: the sequence of factor shapes and the ranks of one layer. Ints only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from kronsearch.errors import SpecError
from kronsearch.sekron.shapes import FactorShapes, Structure, structure_of

__all__ = ["SeKronSpec"]


@dataclass(frozen=True)
class SeKronSpec:
    """A sequence of Kronecker factors, most significant first, and its ranks (Hameed et al., SeKron, 2022).

    The kernel is `W = Σ_{r1} A¹_{r1} ⊗ Σ_{r2} A²_{r1 r2} ⊗ … ⊗ A^S_{r1…r_{S-1}}`.

    Args:
        factor_shapes: S shapes with one entry for each mode of the kernel, (out channels, in channels, *extent);
            their entrywise product is the kernel's shape.
        ranks: (R_1, …, R_{S-1}), the extents of the nested sums.

    Raises:
        SpecError: shapes of different lengths, entries that are not positive ints, a wrong number of ranks, or ranks
            above what any kernel of that shape can need.
    """

    factor_shapes: FactorShapes
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor_shapes", tuple(map(tuple, self.factor_shapes)))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        shapes, ranks = self.factor_shapes, self.ranks
        if not shapes or len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < 2:
            raise SpecError(
                f"factor shapes {shapes} need one entry per mode of the kernel (two at least), the same number in each"
            )
        for value in (*(n for shape in shapes for n in shape), *ranks):
            if type(value) is not int or value < 1:
                raise SpecError(f"factor shapes {shapes} and ranks {ranks} must be positive whole numbers")
        if len(ranks) != len(shapes) - 1:
            raise SpecError(f"{len(shapes)} factors take {len(shapes) - 1} ranks, got {len(ranks)}: {ranks}")
        if len(shapes) == 2 and ranks[0] > (limit := min(map(prod, shapes))):
            raise SpecError(f"rank {ranks[0]} of {shapes} is above {limit}, where the sum is exact already")
        if prod(ranks) > (limit := prod(self.kernel_shape)):
            raise SpecError(f"ranks {ranks} have more terms than the kernel of {shapes} has entries ({limit})")

    @property
    def sequence_length(self) -> int:
        """S, the number of factors."""
        return len(self.factor_shapes)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel, (out channels, in channels, *extent)."""
        return tuple(map(prod, zip(*self.factor_shapes, strict=True)))

    @property
    def structure(self) -> Structure:
        """The kind of structure of the sequence."""
        return structure_of(self.factor_shapes)

    def rank_shape(self, k: int) -> tuple[int, ...]:
        """Return the rank indices of factor k (from 0): (R_1, …, R_min(k+1, S-1))."""
        return self.ranks[: k + 1]

    @property
    def tensor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the S factor tensors, (R_1, …, R_min(k, S-1), *factor shape)."""
        return tuple((*self.rank_shape(k), *shape) for k, shape in enumerate(self.factor_shapes))

    @property
    def params(self) -> int:
        """The number of entries of all factors together."""
        return sum(map(prod, self.tensor_shapes))

    def check_kernel(self, kernel_shape: Sequence[int]) -> None:
        """Raise `SpecError` unless the factors multiply to this kernel shape."""
        if tuple(kernel_shape) != self.kernel_shape:
            raise SpecError(
                f"factor shapes {self.factor_shapes} multiply to {self.kernel_shape}, not to the kernel's shape "
                f"{tuple(kernel_shape)}"
            )

    def __str__(self) -> str:
        """Write the spec on one short line, such as `16·1·1·3 ⊗ 1·16·3·1, R 5`."""
        shapes = " ⊗ ".join("·".join(map(str, shape)) for shape in self.factor_shapes)
        return f"{shapes}, R {','.join(map(str, self.ranks))}" if self.ranks else shapes
