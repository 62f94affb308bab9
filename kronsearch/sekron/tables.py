"""Error tables: what every rank of a sequence costs in accuracy of the kernel, without running the network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kronsearch.sekron.fit import fit, grow
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.shapes import FactorShapes
from kronsearch.sekron.tensors import unfold_kernel

__all__ = ["ErrorTable", "cp_table", "pair_table", "rank_grid"]

_STEP_SWEEPS = 30  # at each rank of a warm-started ladder; measured within 3 % of 300 sweeps from scratch


@dataclass(frozen=True)
class ErrorTable:
    """The errors of one sequence at several ranks.

    Args:
        factor_shapes: the sequence.
        ranks: (count,) R_1, ascending; all other ranks are 1.
        errors: (count,) relative squared errors `‖W - Ŵ‖² / ‖W‖²` in the norm of the table's metric.
    """

    factor_shapes: FactorShapes
    ranks: NDArray[np.int64]
    errors: NDArray[np.float64]

    def rows(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yield (ranks, relative squared error) of every entry."""
        ones = (1,) * (len(self.factor_shapes) - 2)
        for rank, error in zip(self.ranks.tolist(), self.errors.tolist(), strict=True):
            yield (rank, *ones), error


def pair_table(kernel: Tensor, factor_shapes: FactorShapes, *, metric: Metric | None = None) -> ErrorTable:
    """Return the exact errors of all ranks of a sequence of two factors (Eckart and Young, 1936).

    Only the eigenvalues of the smaller Gram matrix are formed. Errors below 1e-15 of the kernel's energy, near the
    full rank, are rounding.
    """
    matrix = unfold_kernel(kernel.detach().double(), factor_shapes)
    if metric is not None:
        matrix = metric.weight(matrix, factor_shapes)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending
    tails = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    energy = float(tails[-1]) or 1.0
    errors = (tails[:-1].flip(0) / energy).numpy()
    return ErrorTable(factor_shapes, np.arange(1, len(errors) + 1), errors)


def cp_table(
    kernel: Tensor, factor_shapes: FactorShapes, ranks: Sequence[int], *, metric: Metric | None = None
) -> ErrorTable:
    """Return fitted errors of a sequence of three factors or more with the ranks (R, 1, …), R ascending.

    Each rank's fit starts from the one before it. The errors are upper bounds: a longer fit is lower by a few percent.
    """
    tensor = unfold_kernel(kernel.detach().float(), factor_shapes)
    if metric is not None:
        tensor = metric.weight(tensor, factor_shapes)
    ones = (1,) * (len(factor_shapes) - 2)
    matrices: list[Tensor] | None = None
    errors: list[float] = []
    for rank in ranks:
        start = None if matrices is None else grow(tensor, matrices, rank)
        matrices, error = fit(tensor, (rank, *ones), start=start, sweeps=_STEP_SWEEPS)
        errors.append(min([error, *errors[-1:]]))
    return ErrorTable(factor_shapes, np.asarray(ranks, dtype=np.int64), np.asarray(errors))


def rank_grid(highest: int, *, points: int) -> tuple[int, ...]:
    """Return at most that many ranks from 1 to the highest, in about equal ratios."""
    if highest < 1:
        return ()
    return tuple(sorted({round(float(rank)) for rank in np.geomspace(1, highest, points)}))
