"""Error tables: what every rank of a sequence costs in accuracy of the kernel, without running the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from kronsearch.errors import SpecError
from kronsearch.sekron.chain import chain_squares
from kronsearch.sekron.fit import fit, grow, working_dtype
from kronsearch.sekron.kernels import in_units
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.shapes import FactorShape, FactorShapes
from kronsearch.sekron.spec import Coupling, check_product
from kronsearch.sekron.tensors import unfold_kernel

__all__ = ["ErrorTable", "chain_table", "cp_table", "pair_table", "pair_tables", "rank_grid"]

_STEP_SWEEPS = 60  # at each rank of a warm-started ladder: within some percent of a full fit where errors matter
_LARGE_STEP_SWEEPS = 12  # of a large kernel, where they take seconds
_KEPT = 2**29  # bytes of Gram matrices that others may be traced from
_STEEP = 0.1  # of the error at the next lower rank that was fitted
_NO_ERROR = 1e-12  # float32 fits are no better, and a logarithm is taken


@dataclass(frozen=True)
class ErrorTable:
    """The errors of one sequence at several ranks.

    Args:
        factor_shapes: the sequence.
        ranks: (count, S - 1).
        errors: (count,) relative squared errors `‖W - Ŵ‖² / ‖W‖²` in the norm of the table's metric.
        coupling: of the factors.
    """

    factor_shapes: FactorShapes
    ranks: NDArray[np.int64]
    errors: NDArray[np.float64]
    coupling: Coupling = "tree"


def pair_table(kernel: Tensor, factor_shapes: FactorShapes, *, metric: Metric | None = None) -> ErrorTable:
    """Return the exact errors of all ranks of one sequence of two factors, as `pair_tables` does of many."""
    return pair_tables(kernel, [factor_shapes], metric=metric)[0]


def pair_tables(kernel: Tensor, sequences: Sequence[FactorShapes], *, metric: Metric | None = None) -> list[ErrorTable]:
    """Return the exact errors of all ranks of sequences of two factors, ascending (Eckart and Young, 1936).

    Only the eigenvalues of the smaller Gram matrix are formed. In the plain norm that is a partial trace of the Gram
    matrix of any sequence whose factor on that side is a multiple of this one's, where there was one before: the larger
    matrices alone are multiplied out. Errors below 1e-15 of the kernel's energy, near the full rank, are rounding; of
    large kernels, whose Gram matrices are formed in float32, those below 1e-6.

    Args:
        kernel: (out channels, in channels, *extent).
        sequences: of two factor shapes each.
        metric: of the layer, plain when None.

    Raises:
        SpecError: a sequence is not one of two factors that multiply to the kernel, or the kernel can't be decomposed.
    """
    for shapes in sequences:
        _check_pair(kernel, shapes)
    kernel = in_units(kernel)[0].to(working_dtype(kernel))
    kept: dict[tuple[int, FactorShape], Tensor] = {}  # by side and its factor shape
    tables: dict[int, ErrorTable] = {}
    for index in sorted(range(len(sequences)), key=lambda i: -min(map(prod, sequences[i]))):
        shapes = sequences[index]
        side = 0 if prod(shapes[0]) <= prod(shapes[1]) else 1
        gram = None if metric is not None else _traced(kept, side, shapes[side])
        if gram is None:
            matrix = unfold_kernel(kernel, shapes)
            if metric is not None:
                matrix = metric.weight(matrix, shapes)
            gram = matrix @ matrix.T if side == 0 else matrix.T @ matrix
        if metric is None and sum(other.nbytes for other in kept.values()) + gram.nbytes <= _KEPT:
            kept[side, shapes[side]] = gram
        tables[index] = _table_of(gram, shapes)
    return [tables[index] for index in range(len(sequences))]


def _check_pair(kernel: Tensor, factor_shapes: FactorShapes) -> None:
    if len(factor_shapes) != 2:
        raise SpecError(f"a table of pairs takes two factors, {factor_shapes} has {len(factor_shapes)}")
    check_product(factor_shapes, kernel.shape)


def _traced(kept: Mapping[tuple[int, FactorShape], Tensor], side: int, shape: FactorShape) -> Tensor | None:
    """Return the Gram matrix of a factor shape as the partial trace of the smallest one that has it."""
    above = [
        (prod(wide), wide)
        for other, wide in kept
        if other == side and all(n % m == 0 for n, m in zip(wide, shape, strict=True))
    ]
    if not above:
        return None
    wide = min(above)[1]
    # the digits of the leading factor come first in each mode, those of the trailing one last
    digits = [pair for n, m in zip(wide, shape, strict=True) for pair in ((m, n // m) if side == 0 else (n // m, m))]
    rows = list(range(len(digits)))
    summed, own = (rows[1::2], rows[::2]) if side == 0 else (rows[::2], rows[1::2])
    columns = [row + len(rows) for row in rows]
    gram = kept[side, wide].reshape(digits * 2)
    order = [*own, *(columns[row] for row in own), *summed, *(columns[row] for row in summed)]
    over, size = prod(wide) // prod(shape), prod(shape)
    return gram.permute(order).reshape(size, size, over, over).diagonal(dim1=2, dim2=3).sum(-1)


def _table_of(gram: Tensor, shapes: FactorShapes) -> ErrorTable:
    squares = torch.linalg.eigvalsh(gram).double().clamp_min(0)  # ascending
    tails = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    energy = float(tails[-1]) or 1.0
    errors = (tails[:-1].flip(0) / energy).cpu().numpy()
    return ErrorTable(shapes, np.arange(1, len(errors) + 1)[:, None], errors)


def cp_table(
    kernel: Tensor, factor_shapes: FactorShapes, highest: int, *, fits: int, metric: Metric | None = None
) -> ErrorTable:
    """Return errors of a sequence of three factors or more with the ranks (R, 1, …), R ascending up to the highest.

    The kernel is fitted at rank 1 and `fits` others in equal ratios, each fit starting from the one before it. Fitted
    errors are upper bounds: a longer fit is lower, by some percent where the error is above a hundredth. Between them
    the error is interpolated (it is smooth in the rank) at three times as many ranks. Where it falls to less than a
    tenth, as at the rank of a kernel that was made of so many terms, ranks between are fitted as well.

    Raises:
        SpecError: fewer than two fits: all between would be a guess. Or the factor shapes don't multiply to the kernel,
            or it can't be decomposed.
    """
    if fits < 2:
        raise SpecError(f"a table of ranks up to {highest} from {fits} fits was asked for: it takes two at the least")
    check_product(factor_shapes, kernel.shape)
    tensor = unfold_kernel(in_units(kernel)[0].to(working_dtype(kernel)), factor_shapes)
    if metric is not None:
        tensor = metric.weight(tensor, factor_shapes)
    ones = (1,) * (len(factor_shapes) - 2)
    sweeps = _STEP_SWEEPS if tensor.dtype == torch.float64 else _LARGE_STEP_SWEEPS
    found: dict[int, tuple[list[Tensor], float]] = {}  # by rank, the factor matrices and their error

    def fit_at(rank: int, below: int | None) -> int:
        start = None if below is None else grow(tensor, found[below][0], rank)
        matrices, error = fit(tensor, (rank, *ones), start=start, sweeps=sweeps)
        found[rank] = matrices, max(error, _NO_ERROR)
        return rank

    below: int | None = None
    for rank in rank_grid(highest, points=fits):
        below = fit_at(rank, below)
    while (steep := _steep({rank: error for rank, (_, error) in found.items()})) is not None:
        fit_at(sum(steep) // 2, steep[0])
    fitted = sorted(found)
    errors = np.minimum.accumulate([found[rank][1] for rank in fitted])
    ranks = sorted({*fitted, *rank_grid(highest, points=4 * fits)})
    if len(fitted) > 1:
        errors = np.exp(PchipInterpolator(np.log(fitted), np.log(errors))(np.log(ranks)))
    table = np.ones((len(ranks), len(factor_shapes) - 1), dtype=np.int64)
    table[:, 0] = ranks
    return ErrorTable(factor_shapes, table, np.asarray(errors))


def _steep(errors: Mapping[int, float]) -> tuple[int, int] | None:
    """Return two ranks between which the error falls steeply and nothing was fitted, None if there are none."""
    for low, high in pairwise(sorted(errors)):
        if high - low > 1 and errors[high] < _STEEP * errors[low]:
            return low, high
    return None


def chain_table(kernel: Tensor, factor_shapes: FactorShapes, *, metric: Metric | None = None) -> ErrorTable:
    """Return the errors of the truncated SVDs of a chain of three factors, at all pairs of ranks (Oseledets, 2011).

    They are exact for `decompose(..., refine=False)`; the fit that is its default is lower, by some percent as a rule.
    Ranks R_2 that a middle factor of R_1 rows can't have, and those that `SeKronSpec` refuses, are left out.

    Raises:
        SpecError: the sequence has not three factors.
    """
    if len(factor_shapes) != 3:
        raise SpecError(f"a table of chains takes three factors, {factor_shapes} has {len(factor_shapes)}")
    check_product(factor_shapes, kernel.shape)
    tensor = unfold_kernel(in_units(kernel)[0].double(), factor_shapes)
    if metric is not None:
        tensor = metric.weight(tensor, factor_shapes)
    squares = chain_squares(tensor).cpu().numpy()
    first, second = (index.ravel() + 1 for index in np.indices(squares.shape))
    kept = second <= first * tensor.shape[1]
    energy = float(tensor.square().sum()) or 1.0
    ranks = np.stack([first, second], 1)[kept]
    return ErrorTable(factor_shapes, ranks, squares.ravel()[kept] / energy, "chain")


def rank_grid(highest: int, *, points: int) -> tuple[int, ...]:
    """Return rank 1 and at most that many others, in about equal ratios from a 64th of the highest to the highest."""
    if highest < 1:
        return ()
    spread = np.geomspace(max(1, highest / 64), highest, points)
    return tuple(sorted({1, *(round(float(rank)) for rank in spread)}))
