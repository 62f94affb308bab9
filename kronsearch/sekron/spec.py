"""`SeKronSpec`: the sequence of factor shapes and the ranks of one layer. Ints only."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from numbers import Integral
from typing import Literal

from kronsearch.errors import SpecError
from kronsearch.sekron.shapes import FactorShapes, Structure, structure_of

__all__ = ["Coupling", "Run", "SeKronSpec", "all_merged", "check_product"]

_MOST = 16  # factors, and modes of a kernel
_LARGEST = 2**31  # is above all entries of shapes, and ranks

Coupling = Literal["tree", "chain"]
Run = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SeKronSpec:
    """A sequence of Kronecker factors, most significant first, and its ranks.

    In a tree the kernel is `W = Σ_{r1} A¹_{r1} ⊗ Σ_{r2} A²_{r1 r2} ⊗ … ⊗ A^S_{r1…r_{S-1}}` (Hameed et al., SeKron,
    2022): a factor has an index for each sum that it stands in. In a chain it has those of its two neighbours only,
    `W = Σ_{r1…} A¹_{r1} ⊗ A²_{r1 r2} ⊗ A³_{r2 r3} ⊗ … ⊗ A^S_{r_{S-1}}`: a tensor train (Oseledets, 2011) of Kronecker
    factors. With two factors they are the same, and called a tree.

    Args:
        factor_shapes: S shapes with one entry for each mode of the kernel, (out channels, in channels, *extent);
            their entrywise product is the kernel's shape.
        ranks: (R_1, …, R_{S-1}), the extents of the sums.
        coupling: "tree" or "chain".
        run: groups of neighbouring factors (from 0) in the order in which a layer runs them; those of a group are
            merged into one factor beforehand. () is last to first, one by one. It changes what a layer costs, not what
            it computes.

    Raises:
        SpecError: shapes of different lengths, more than 16 factors or modes, entries that are not positive ints below
            2^31, a wrong number of ranks, ranks above what any kernel of that shape can need, or a run that is not of
            these factors.
    """

    factor_shapes: FactorShapes
    ranks: tuple[int, ...] = ()
    coupling: Coupling = "tree"
    run: Run = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor_shapes", tuple(tuple(map(_plain, shape)) for shape in self.factor_shapes))
        object.__setattr__(self, "ranks", tuple(map(_plain, self.ranks)))
        shapes, ranks = self.factor_shapes, self.ranks
        # before anything is multiplied or told: files of other people say these numbers
        if max(len(shapes), len(ranks) + 1, *map(len, shapes)) > _MOST:
            raise SpecError(f"a sequence has at most {_MOST} factors, of a kernel with as many modes at the most")
        for value in (*(n for shape in shapes for n in shape), *ranks):
            if type(value) is not int or not 0 < value < _LARGEST:
                told = "" if isinstance(value, int) and abs(value) >= _LARGEST else f", not {value!r}"
                raise SpecError(f"factor shapes and ranks must be positive whole numbers below {_LARGEST}{told}")
        if not shapes or len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < 2:
            raise SpecError(
                f"factor shapes {shapes} need one entry per mode of the kernel (two at least), the same number in each"
            )
        if len(ranks) != len(shapes) - 1:
            raise SpecError(f"{len(shapes)} factors take {len(shapes) - 1} ranks, got {len(ranks)}: {ranks}")
        if self.coupling not in ("tree", "chain"):
            raise SpecError(f'a coupling is "tree" or "chain", not {self.coupling!r}')
        if len(shapes) <= 2:
            object.__setattr__(self, "coupling", "tree")
        if len(shapes) == 2 or self.coupling == "chain":
            for k, rank in enumerate(ranks):
                limit = min(prod(map(prod, shapes[: k + 1])), prod(map(prod, shapes[k + 1 :])))
                if rank > limit:
                    raise SpecError(f"rank {rank} of {shapes} is above {limit}, where the sum is exact already")
        if self.coupling == "tree" and prod(ranks) > (limit := prod(self.kernel_shape)):
            raise SpecError(f"ranks {ranks} have more terms than the kernel of {shapes} has entries ({limit})")
        self._check_run()

    def _check_run(self) -> None:
        run, length = tuple(map(tuple, self.run)), self.sequence_length
        named = [k for group in run for k in group]
        if run and not (
            all(type(k) is int for k in named)
            and sorted(named) == list(range(length))
            and all(group and group == tuple(range(group[0], group[-1] + 1)) for group in run)
        ):
            told = f", not {run}" if len(named) <= _MOST else ""
            raise SpecError(
                f"a run of {length} factors names each of 0 … {length - 1} once, in groups of neighbours{told}"
            )
        object.__setattr__(self, "run", () if run == one_by_one(length) else run)

    @property
    def sequence_length(self) -> int:
        """S, the number of factors."""
        return len(self.factor_shapes)

    @cached_property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel, (out channels, in channels, *extent)."""
        return tuple(map(prod, zip(*self.factor_shapes, strict=True)))

    @property
    def structure(self) -> Structure:
        """The kind of structure of the sequence."""
        return structure_of(self.factor_shapes)

    @property
    def order(self) -> Run:
        """The groups of factors in the order in which they run."""
        return self.run or one_by_one(self.sequence_length)

    def held(self, factors: Collection[int]) -> tuple[int, ...]:
        """Return which ranks (from 0) have an index that some of these factors, and some of the others, have.

        One factor has no other indices. Of several they are what is left when the sums within them are done.
        """
        others = set(range(self.sequence_length)).difference(factors)
        if not factors or not others:
            return ()
        if self.coupling == "tree":  # r_{i+1} is an index of factor i and of all behind it
            return tuple(range(min(max(factors), max(others)) + 1))
        return tuple(i for i in range(self.sequence_length - 1) if (i in others) != (i + 1 in others))

    def rank_shape(self, k: int) -> tuple[int, ...]:
        """Return the rank indices of factor k (from 0): (R_1, …, R_min(k+1, S-1)); of a chain the last two of them.

        The last factor of a chain has but R_{S-1}.
        """
        return self.ranks[: k + 1] if self.coupling == "tree" else self.ranks[max(k - 1, 0) : k + 1]

    @cached_property
    def tensor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the S factor tensors, each its rank indices and then its factor shape."""
        return tuple((*self.rank_shape(k), *shape) for k, shape in enumerate(self.factor_shapes))

    @property
    def params(self) -> int:
        """The number of entries of all factors together."""
        return sum(map(prod, self.tensor_shapes))

    def merged_params(self, group: Sequence[int]) -> int:
        """Return the most entries that a factor has while neighbouring ones are merged, from the last to the first."""
        return max(
            prod(self.ranks[i] for i in self.held(part)) * prod(prod(self.factor_shapes[k]) for k in part)
            for part in (group[start:] for start in range(len(group)))
        )

    def check_kernel(self, kernel_shape: Sequence[int]) -> None:
        """Raise `SpecError` unless the factors multiply to this kernel shape."""
        check_product(self.factor_shapes, kernel_shape)

    def __str__(self) -> str:
        """Write the spec on one short line, such as `16·1·1·3 ⊗ 1·16·3·1, R 5`."""
        shapes = " ⊗ ".join("·".join(map(str, shape)) for shape in self.factor_shapes)
        chain = " chain" if self.coupling == "chain" else ""
        run = f", run {','.join('+'.join(map(str, group)) for group in self.run)}" if self.run else ""
        return f"{shapes}, R {','.join(map(str, self.ranks))}{chain}{run}" if self.ranks else shapes


def one_by_one(length: int) -> Run:
    """Return the run of this many factors, last to first, none merged."""
    return tuple((k,) for k in reversed(range(length)))


def all_merged(length: int) -> Run:
    """Return the run that merges this many factors into one, which is the kernel."""
    return (tuple(range(length)),)


def _plain(value: int) -> int:
    """Return a whole number of another kind, such as NumPy's, as an int, and all else as it is."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def check_product(factor_shapes: FactorShapes, kernel_shape: Sequence[int]) -> None:
    """Raise `SpecError` unless factor shapes multiply to this kernel shape."""
    product = tuple(map(prod, zip(*factor_shapes, strict=False)))
    if tuple(kernel_shape) != product:
        raise SpecError(
            f"factor shapes {factor_shapes} multiply to {product}, not to the kernel's shape {tuple(kernel_shape)}"
        )
