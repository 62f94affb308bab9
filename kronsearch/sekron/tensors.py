"""The kernel as a tensor with one mode for each factor, the factors as matrices, and the way back.

A sequence of S factor shapes divides every mode of the kernel into S digits. Grouped by factor, the kernel becomes a
tensor `T` of S modes, mode k of extent `n_k = prod(factor_shapes[k])`, and the SeKron model becomes
`T[i_1…i_S] = Σ_{r1} A¹[r1, i_1] Σ_{r2} A²[r1, r2, i_2] …`: Kronecker products are outer products there. What is said
of terms here holds for trees; chains have a page of their own.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache, reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kronsearch.errors import SpecError
from kronsearch.sekron.chain import balance_chain
from kronsearch.sekron.contraction import contract
from kronsearch.sekron.shapes import FactorShapes
from kronsearch.sekron.spec import SeKronSpec

__all__ = [
    "all_but",
    "as_matrices",
    "balance",
    "balanced_factors",
    "fold_kernel",
    "leaves",
    "merge",
    "reconstruct",
    "unfold_kernel",
]


class _Folds(NamedTuple):
    """The shapes and orders of a kernel's digits, by mode and by factor."""

    by_mode: tuple[int, ...]
    to_factors: tuple[int, ...]
    by_factor: tuple[int, ...]
    to_modes: tuple[int, ...]
    sizes: tuple[int, ...]
    kernel_shape: tuple[int, ...]


@lru_cache(maxsize=2**12)  # a training step needs them again and again
def _folds(factor_shapes: FactorShapes) -> _Folds:
    length, modes = len(factor_shapes), len(factor_shapes[0])
    return _Folds(
        by_mode=tuple(shape[mode] for mode in range(modes) for shape in factor_shapes),
        to_factors=tuple(mode * length + k for k in range(length) for mode in range(modes)),
        by_factor=tuple(n for shape in factor_shapes for n in shape),
        to_modes=tuple(k * modes + mode for mode in range(modes) for k in range(length)),
        sizes=tuple(prod(shape) for shape in factor_shapes),
        kernel_shape=tuple(prod(shape[mode] for shape in factor_shapes) for mode in range(modes)),
    )


def unfold_kernel(kernel: Tensor, factor_shapes: FactorShapes) -> Tensor:
    """Rearrange a kernel into the tensor with one mode of extent `prod(factor_shapes[k])` for each factor."""
    folds = _folds(factor_shapes)
    return kernel.reshape(folds.by_mode).permute(folds.to_factors).reshape(folds.sizes)


def fold_kernel(tensor: Tensor, factor_shapes: FactorShapes) -> Tensor:
    """Undo `unfold_kernel`."""
    folds = _folds(factor_shapes)
    return tensor.reshape(folds.by_factor).permute(folds.to_modes).reshape(folds.kernel_shape)


def leaves(factors: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Repeat the rows of each factor matrix (terms of its own, n_k) for all terms, the product of the ranks."""
    terms = prod(ranks)
    return [factor.repeat_interleave(terms // len(factor), dim=0) for factor in factors]


def all_but(tensors: Sequence[Tensor], k: int) -> Tensor:
    """Multiply all of these entry by entry, but the k-th."""
    return reduce(torch.mul, (tensor for j, tensor in enumerate(tensors) if j != k))


def as_matrices(factors: Sequence[Tensor], spec: SeKronSpec) -> list[Tensor]:
    """View each factor as a matrix (terms of its own, entries)."""
    if tuple(tuple(factor.shape) for factor in factors) != spec.tensor_shapes:
        raise SpecError(
            f"factors of {spec} have the shapes {spec.tensor_shapes}, got {tuple(tuple(f.shape) for f in factors)}"
        )
    return [factor.reshape(prod(spec.rank_shape(k)), prod(spec.factor_shapes[k])) for k, factor in enumerate(factors)]


def as_factors(matrices: Sequence[Tensor], spec: SeKronSpec) -> tuple[Tensor, ...]:
    """Undo `as_matrices`."""
    return tuple(m.reshape(shape) for m, shape in zip(matrices, spec.tensor_shapes, strict=True))


def reconstruct(factors: Sequence[Tensor], spec: SeKronSpec) -> Tensor:
    """Return the kernel (out channels, in channels, *extent) of factors (Hameed et al., SeKron, 2022, equation 3).

    Differentiable. Its cost is that of the dense kernel times the number of terms; layers don't use it to run. The
    kernel is contiguous: torch's grouped convolutions of channels-last images on CPUs are wrong for a weight of which
    an axis of one entry has the stride 1.

    Raises:
        SpecError: the factors' shapes are not those of the spec.
    """
    return fold_kernel(contract(as_matrices(factors, spec), spec.ranks), spec.factor_shapes).contiguous()


def merge(factors: Sequence[Tensor], spec: SeKronSpec, group: Sequence[int]) -> Tensor:
    """Return the one factor that stands for neighbouring ones, (the ranks it shares with others, *its factor shape).

    Differentiable. It takes elementwise operations only, which no counter of MACs takes for an example's work, and sums
    in single precision at least.
    """
    last = group[-1]
    merged, held = factors[last], spec.held((last,))
    for k in reversed(group[:-1]):
        own, together = spec.held((k,)), spec.held(range(k, last + 1))
        ranks = sorted({*own, *held})
        left, right = _aligned(factors[k], own, ranks, (0, 1)), _aligned(merged, held, ranks, (1, 0))
        if k in together:
            merged = left * right
        else:  # the rank between the two is no other factor's
            terms = zip(left.unbind(ranks.index(k)), right.unbind(ranks.index(k)), strict=True)
            start = left.new_zeros(1, dtype=torch.float32)
            merged = reduce(lambda total, term: torch.addcmul(total, *term), terms, start).to(left.dtype)
        held = together
        shape = map(prod, zip(*spec.factor_shapes[k : last + 1], strict=True))
        merged = merged.reshape([*(spec.ranks[i] for i in held), *shape])
    return merged


def _aligned(factor: Tensor, own: Collection[int], ranks: Sequence[int], places: tuple[int, int]) -> Tensor:
    """View a factor (ranks of its own, *modes) with a dimension for all of these ranks, and two for each mode.

    The mode itself is the first or the second of the two, by `places` (0, 1) or (1, 0).
    """
    sizes = iter(factor.shape)
    shape = [next(sizes) if rank in own else 1 for rank in ranks]
    return factor.reshape([*shape, *((n, 1)[place] for n in sizes for place in places)])


def balanced_factors(matrices: Sequence[Tensor], spec: SeKronSpec) -> tuple[Tensor, ...]:
    """Return the factors of factor matrices, with norms that suit training (`balance`, `balance_chain`)."""
    balanced = balance if spec.coupling == "tree" else balance_chain
    return as_factors(balanced(matrices, spec.ranks), spec)


def balance(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Scale the factors of every term to equal norms, their product unchanged.

    Where a factor is shared by several terms, its norm is the one that balances it against the root mean square of
    what it is multiplied with. Unbalanced factors make fine-tuning diverge.
    """
    balanced = [matrix.clone() for matrix in matrices]
    tiny = torch.finfo(balanced[0].dtype).tiny
    for k in range(len(balanced) - 1):
        norms = [row.norm(dim=1) for row in leaves(balanced[k:], ranks)]
        own = len(balanced[k])
        below = torch.stack(norms[1:]).prod(dim=0).square().reshape(own, -1).mean(dim=1).sqrt()
        norm, depth = balanced[k].norm(dim=1), len(balanced) - k
        wanted = (norm * below) ** (1 / depth)
        scale = torch.where(wanted > tiny, wanted / norm.clamp_min(tiny), torch.ones_like(norm))
        balanced[k] *= scale[:, None]
        following = len(balanced[k + 1])
        balanced[k + 1] /= scale.repeat_interleave(following // own)[:, None]
    return balanced
