"""CP, Tucker, tensor train and tensor ring as sequences of Kronecker factors, exactly.

Where every factor lies on one mode of the kernel, the Kronecker products are outer products of vectors, and the formats
are members of the SeKron family (Hameed et al., SeKron, 2022): the sums of a format become the sums of a tree, or for a
tensor train of a chain. A factor of a tree has an index for each sum that it stands in. Those that its format does not
have are ties: the same entries again for every value of the index. The spec counts them each time, the format once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kronsearch.errors import SpecError
from kronsearch.sekron.shapes import FactorShapes
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["FamilyMember", "from_cp", "from_tr", "from_tt", "from_tucker"]


@dataclass(frozen=True, eq=False)
class FamilyMember:
    """A kernel in a format of the SeKron family; `from_cp`, `from_tucker`, `from_tt` and `from_tr` make it.

    Args:
        spec: the sequence with every factor on one mode of the kernel.
        own: the tensors that the format itself stores, in the order in which they were given.
    """

    spec: SeKronSpec
    own: tuple[Tensor, ...]
    _arrange: Callable[[tuple[Tensor, ...], SeKronSpec], tuple[Tensor, ...]] = field(repr=False)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors, of the shapes `spec.tensor_shapes`, formed anew, differentiable.

        They are views of `own` wherever strides can say it, with tied entries expanded: clone before writing to them.
        """
        return self._arrange(self.own, self.spec)

    @property
    def params(self) -> int:
        """The number of entries that the format itself stores."""
        return sum(tensor.numel() for tensor in self.own)

    @property
    def untied_params(self) -> int:
        """The number of entries of the factors, ties counted each time: those of a layer that trains them freely."""
        return self.spec.params


def from_cp(matrices: Sequence[Tensor], weights: Tensor | None = None) -> FamilyMember:
    """Return a CP decomposition, `W[i_1…i_N] = Σ_r λ_r U¹[i_1, r] … U^N[i_N, r]`, as a tree of ranks (R, 1, …, 1).

    Kolda and Bader, 2009, section 3. Nothing is tied; the weights are multiplied into the first factor, so that with
    them the format stores R entries more than the factors do.

    Args:
        matrices: (n_k, R) for each mode of the kernel (out channels, in channels, *extent).
        weights: λ, (R,); None for ones, which are not stored.

    Raises:
        SpecError: fewer than two matrices, shapes that don't agree in R, or R above what the spec admits.
    """
    shapes = _shapes(matrices)
    if len(shapes) < 2 or any(len(shape) != 2 or shape[1:] != shapes[0][1:] for shape in shapes):
        raise SpecError(
            f"a CP decomposition takes a matrix (n_k, R) for each of two modes or more, R the same, got shapes {shapes}"
        )
    rank = shapes[0][1]
    if weights is not None and tuple(weights.shape) != (rank,):
        raise SpecError(
            f"a CP decomposition of rank {rank} takes weights of shape ({rank},) or None, got {tuple(weights.shape)}"
        )
    spec = SeKronSpec(_one_mode_each([shape[0] for shape in shapes]), (rank, *(1,) * (len(shapes) - 2)))
    return FamilyMember(spec, (*matrices, *(() if weights is None else (weights,))), _arrange_cp)


def from_tucker(core: Tensor, matrices: Sequence[Tensor]) -> FamilyMember:
    """Return a Tucker decomposition as a tree of ranks (R_1, …, R_N) and N + 1 factors, the core being the last.

    `W = Σ_{r1} U¹[:, r1] ⊗ Σ_{r2} U²[:, r2] ⊗ … ⊗ core[r1…rN]` (Tucker, 1966; Kolda and Bader, 2009, section 4). The
    core's factor shape is all ones. Each matrix is tied over the ranks before its own.

    Args:
        core: (R_1, …, R_N).
        matrices: (n_k, R_k) for each mode of the kernel (out channels, in channels, *extent).

    Raises:
        SpecError: fewer than two matrices, a core of other ranks than theirs, or more terms than the spec admits.
    """
    shapes, ranks = _shapes(matrices), tuple(core.shape)
    if len(shapes) < 2 or any(len(shape) != 2 for shape in shapes) or tuple(shape[1] for shape in shapes) != ranks:
        raise SpecError(
            "a Tucker decomposition takes a matrix (n_k, R_k) for each of two modes or more and a core (R_1, …, R_N), "
            f"got matrices of shapes {shapes} and a core of shape {ranks}"
        )
    on_modes = _one_mode_each([shape[0] for shape in shapes])
    spec = SeKronSpec((*on_modes, (1,) * len(shapes)), ranks)
    return FamilyMember(spec, (core, *matrices), _arrange_tucker)


def from_tt(cores: Sequence[Tensor]) -> FamilyMember:
    """Return a tensor train, `W[i_1…i_N] = G¹[0, i_1, :] G²[:, i_2, :] … G^N[:, i_N, 0]`, as a chain of its ranks.

    Oseledets, 2011. Nothing is tied. Of two modes it is a tree, as every sequence of two factors.

    Args:
        cores: (R_{k-1}, n_k, R_k) for each mode of the kernel (out channels, in channels, *extent), R_0 = R_N = 1.

    Raises:
        SpecError: fewer than two cores, ranks that don't link them, or ranks above those of an exact train.
    """
    shapes = _shapes(cores)
    if not _are_linked(shapes) or shapes[0][0] != 1:
        raise SpecError(
            "a tensor train takes a core (R_{k-1}, n_k, R_k) for each of two modes or more, R_0 = R_N = 1 (a tensor "
            f"ring has others), got shapes {shapes}"
        )
    ranks = tuple(shape[2] for shape in shapes[:-1])
    spec = SeKronSpec(_one_mode_each([shape[1] for shape in shapes]), ranks, "chain")
    return FamilyMember(spec, tuple(cores), _arrange_tt)


def from_tr(cores: Sequence[Tensor]) -> FamilyMember:
    """Return a tensor ring, `W[i_1…i_N] = tr(G¹[:, i_1, :] … G^N[:, i_N, :])`, as a tree.

    Zhao et al., 2016. The tree's ranks are (ρ_0·ρ_1, ρ_2, …, ρ_{N-1}): its first sum is over the pair of the two ranks
    of the first core, ρ_0 outermost, as the last core needs ρ_0 again. All later factors are tied over the ranks that
    their cores don't have; of two modes none is.

    Args:
        cores: (ρ_{k-1}, n_k, ρ_k) for each mode of the kernel (out channels, in channels, *extent), ρ_N = ρ_0.

    Raises:
        SpecError: fewer than two cores, ranks that don't link them to a ring, or more terms than the spec admits.
    """
    shapes = _shapes(cores)
    if not _are_linked(shapes):
        raise SpecError(
            "a tensor ring takes a core (ρ_{k-1}, n_k, ρ_k) for each of two modes or more, ρ_N = ρ_0, "
            f"got shapes {shapes}"
        )
    ranks = (shapes[0][0] * shapes[0][2], *(shape[2] for shape in shapes[1:-1]))
    spec = SeKronSpec(_one_mode_each([shape[1] for shape in shapes]), ranks)
    return FamilyMember(spec, tuple(cores), _arrange_tr)


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _one_mode_each(extents: Sequence[int]) -> FactorShapes:
    """Return N factor shapes, the k-th with the k-th extent on mode k and 1 elsewhere."""
    return tuple(tuple(n if mode == k else 1 for mode in range(len(extents))) for k, n in enumerate(extents))


def _are_linked(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Tell whether these are two cores or more of which each begins with the rank before, the first with the last."""
    if len(shapes) < 2 or any(len(shape) != 3 for shape in shapes):
        return False
    return all(shapes[k - 1][2] == shape[0] for k, shape in enumerate(shapes))


def _arrange_cp(own: tuple[Tensor, ...], spec: SeKronSpec) -> tuple[Tensor, ...]:
    length = spec.sequence_length
    first, *others = own[:length]
    columns = [first * own[length] if len(own) > length else first, *others]
    return tuple(matrix.T.reshape(shape) for matrix, shape in zip(columns, spec.tensor_shapes, strict=True))


def _arrange_tucker(own: tuple[Tensor, ...], spec: SeKronSpec) -> tuple[Tensor, ...]:
    core, *matrices = own
    *shapes, core_shape = spec.tensor_shapes
    tied = [
        matrix.T.reshape(-1, *spec.factor_shapes[k]).expand(shape)
        for k, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True))
    ]
    return (*tied, core.reshape(core_shape))


def _arrange_tt(own: tuple[Tensor, ...], spec: SeKronSpec) -> tuple[Tensor, ...]:
    return tuple(core.movedim(1, 2).reshape(shape) for core, shape in zip(own, spec.tensor_shapes, strict=True))


def _arrange_tr(own: tuple[Tensor, ...], spec: SeKronSpec) -> tuple[Tensor, ...]:
    first, *middle, last = (core.movedim(1, 2) for core in own)
    outer, inner, _ = first.shape
    last = last.transpose(0, 1)  # (ρ_0, ρ_{N-1}, n_N)
    if middle:
        # strides can't tie one half of the pair index, so these two are copied, though over no other rank
        middle[0] = middle[0].expand(outer, -1, -1, -1).flatten(0, 1)
        last = last[:, None].expand(-1, inner, -1, -1)
    last = last.flatten(0, 1)
    last = last.reshape(len(last), *(1,) * (len(own) - 3), *last.shape[1:])
    return tuple(
        tensor.reshape(*tensor.shape[:-1], *shape).expand(full)
        for tensor, shape, full in zip(
            (first.flatten(0, 1), *middle, last), spec.factor_shapes, spec.tensor_shapes, strict=True
        )
    )
