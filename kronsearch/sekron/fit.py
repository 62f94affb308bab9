"""Joint fit of all factors by alternating least squares.

With all factors but one fixed, that one solves a linear least-squares problem. Its normal equations need two things:
the Gram matrix of the other factors' products, a Hadamard product of small Gram matrices, and the tensor contracted
with those products. Both are formed term by term as in CP (Kolda and Bader, 2009, section 3.4); where a factor is
shared by several terms, their blocks are added.

What is minimised is not the squared error alone. A sum of terms can come ever nearer to a tensor with ever larger
terms that cancel (de Silva and Lim, 2008), which no half precision can add up, and no fine-tune can follow. So the sum
of the terms' own squared norms is added with a weight in proportion to the squared error reached, which vanishes with
it: a bound on how the terms may exceed the tensor, indifferent to their factors' scales. Phan et al., Stable low-rank
tensor decomposition, 2020, keep the same sum small under a given error. On the kernels of a ResNet-32 the terms'
squares then add up to 2 to 5 times the tensor's, without it to hundreds or thousands, and the error ends lower as well.

Sweeps alone crawl through long valleys. So each starts from a point extrapolated beyond the last one's end, by a length
that grows while the objective falls; where it rises, the sweep is done again from where the last one ended, and the
length shrinks (Ang, Cohen, Gillis and Le Thi, Accelerating block coordinate descent for nonnegative tensor
factorization, 2021). The objective never rises. On those kernels 300 sweeps end at 0.5 to 0.9 of the squared error of
300 plain ones, and below that of 1000.
"""

from collections.abc import Sequence
from functools import reduce
from math import prod
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kronsearch.sekron.contraction import contract
from kronsearch.sekron.svd import recursive_svd
from kronsearch.sekron.tensors import balance

__all__ = ["RESTRAINT", "fit", "grow", "working_dtype"]

Array = NDArray[np.floating[Any]]

_LARGE = 2**19  # entries above which a kernel that is not float64 itself is taken as float32
_MOST_SWEEPS, _FEWEST_SWEEPS = 300, 40
_SWEPT = 30_000_000  # entries of the tensor times sweeps, between those two: a sweep of 2 M entries takes a second
_TOLERANCE = 2e-4  # of the squared error, over `_WINDOW` sweeps
_WINDOW = 5
RESTRAINT = 0.03  # times the squared error, weighs the terms' squared norms; a third and three times of it end higher
_PROXIMAL = 1e-9  # of the Gram matrix's mean eigenvalue, for terms of zero, which nothing else restrains
_FIRST_REACH, _REACH_GROWTH, _BOUND_GROWTH, _REACH_CUT = 0.5, 1.05, 1.01, 1.5  # of the extrapolation


def fit(
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    start: Sequence[Tensor] | None = None,
    sweeps: int | None = None,
    tolerance: float = _TOLERANCE,
) -> tuple[list[Tensor], float]:
    """Fit the factor matrices of a tensor (n_1, …, n_S), S ≥ 2, together; on the CPU, wherever it is.

    Args:
        tensor: the unfolded kernel.
        ranks: (R_1, …, R_{S-1}).
        start: factor matrices to begin with; the recursive SVD when None.
        sweeps: at most that many passes over all factors; None allows 40 on large tensors up to 300 on small ones.
        tolerance: stop when five sweeps lower the objective by less than this part of it.

    Returns:
        Balanced factor matrices (R_1…R_min(k, S-1), n_k), and the relative squared error `‖T - T̂‖² / ‖T‖²`.
    """
    energy = float(tensor.square().sum())
    if energy == 0:
        return recursive_svd(tensor, ranks), 0.0
    matrices = [
        np.ascontiguousarray(matrix.detach().cpu().numpy())
        for matrix in balance(start if start is not None else begin(tensor, ranks), ranks)
    ]
    entries = tensor.detach().contiguous().cpu().numpy()
    rounding = torch.finfo(tensor.dtype).eps
    if sweeps is None:
        sweeps = min(_MOST_SWEEPS, max(_FEWEST_SWEEPS, _SWEPT // tensor.numel()))
    history: list[float] = []  # of the objective
    ahead = matrices  # where the next sweep begins
    reach, bound = _FIRST_REACH, 1.0  # in differences of the last two ends
    weight = RESTRAINT
    for _ in range(sweeps):
        swept = list(ahead)
        squared, terms = (max(part, 0.0) / energy for part in sweep(entries, energy, swept, ranks, weight))
        if history and squared + weight * terms > history[-1] + rounding:
            if ahead is matrices:  # a plain sweep falls until rounding is all that is left
                break
            ahead, bound, reach = matrices, reach, reach / _REACH_CUT
            continue
        ahead = [end + reach * (end - begun) for end, begun in zip(swept, matrices, strict=True)]
        reach, bound = min(bound, reach * _REACH_GROWTH), min(1.0, bound * _BOUND_GROWTH)
        matrices = swept
        weight = min(weight, RESTRAINT * squared)
        history.append(squared + weight * terms)
        if squared < 10 * rounding:
            break
        if len(history) > _WINDOW and history[-1 - _WINDOW] - history[-1] < tolerance * history[-1]:
            break
    found = balance([torch.from_numpy(matrix).to(tensor.device) for matrix in matrices], ranks)
    return found, float((tensor - contract(found, ranks)).square().sum()) / energy


def working_dtype(kernel: Tensor) -> torch.dtype:
    """Return what to fit and tabulate a kernel in: float32 for large ones, which need no more digits than it has."""
    return torch.float32 if kernel.numel() > _LARGE and kernel.dtype != torch.float64 else torch.float64


def sweep(
    tensor: Array, energy: float, matrices: list[Array], ranks: Sequence[int], weight: float
) -> tuple[float, float]:
    """Update every factor in place once.

    The tensor is contracted twice: with the last factor for all the others, with the others for the last. What is done
    entry by entry is done by numpy, whose calls on small arrays cost a fraction of torch's. Products and solutions are
    torch's all the same: the threads of NumPy's and SciPy's own libraries wait for torch's and these for them, and a
    fit on two cores took 20 to 40 times as long.

    Args:
        tensor: (n_1, …, n_S), contiguous.
        energy: its squared norm.
        matrices: factor matrices of its dtype.
        ranks: (R_1, …, R_{S-1}).
        weight: of the terms' squared norms.

    Returns:
        After the last update the squared error, and the sum of the terms' squared norms, which counts `weight` times.
    """
    terms, last = prod(ranks), len(matrices) - 1
    columns = [repeated(matrix, terms) for matrix in matrices]
    upright = [np.ascontiguousarray(column.T) for column in columns]
    grams = [product(column, tall) for column, tall in zip(columns, upright, strict=True)]
    squared = norms = 0.0
    shared = product(tensor.reshape(-1, tensor.shape[-1]), upright[last]).reshape(*tensor.shape[:-1], terms)
    for k in range(last + 1):
        if k < last:
            partial, modes = shared, ascii_lowercase[:last]
            for mode, tall in zip(modes, upright, strict=False):
                if mode != ascii_lowercase[k]:
                    rest = modes.replace(mode, "")
                    partial = np.einsum(f"{modes}z,{mode}z->{rest}z", partial, tall)
                    modes = rest
            moment = partial.T
        else:
            khatri_rao = columns[0]
            for column in columns[1:last]:
                khatri_rao = (khatri_rao[:, :, None] * column[:, None, :]).reshape(terms, -1)
            moment = product(khatri_rao, tensor.reshape(-1, tensor.shape[-1]))
        gram = reduce(np.multiply, (grams[j] for j in range(last + 1) if j != k))
        own = len(matrices[k])
        restraint = gram.diagonal().reshape(own, -1).sum(1)
        if own < terms:
            moment = moment.reshape(own, terms // own, -1).sum(1)
            gram = gram.reshape(own, terms // own, own, terms // own).sum((1, 3))
        matrices[k] = solve(gram, weight * restraint, moment, matrices[k])
        if k == last:
            squared = energy + float((matrices[k] * (product(gram, matrices[k]) - 2 * moment)).sum())
            norms = float(restraint @ np.square(matrices[k]).sum(1))
        columns[k] = repeated(matrices[k], terms)
        upright[k] = np.ascontiguousarray(columns[k].T)
        grams[k] = product(columns[k], upright[k])
    return squared, norms


def repeated(matrix: Array, terms: int) -> Array:
    """Repeat the rows of a factor matrix for all terms, as `leaves` does."""
    return matrix if len(matrix) == terms else matrix.repeat(terms // len(matrix), axis=0)


def product(left: Array, right: Array) -> Array:
    """Multiply matrices, by torch."""
    return np.asarray(torch.from_numpy(left).mm(torch.from_numpy(right)).numpy())


def solve(gram: Array, diagonal: Array, moment: Array, previous: Array) -> Array:
    """Solve `(gram + diagonal) X = moment` for one factor; near-singular directions stay as they are in `previous`."""
    delta = _PROXIMAL * float(gram.trace() + diagonal.sum()) / len(gram)
    for _ in range(8):
        shifted = gram.copy()
        shifted.reshape(-1)[:: len(gram) + 1] += diagonal + delta
        triangle, failed = torch.linalg.cholesky_ex(torch.from_numpy(shifted))
        if not failed:
            found = torch.cholesky_solve(torch.from_numpy(moment + delta * previous), triangle)
            return np.ascontiguousarray(found.numpy())
        delta = 10 * delta
    return previous


def begin(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return factor matrices to begin with: the recursive SVD's, or for CP-like ranks its largest terms.

    A recursive SVD has at most n_1 blocks, one for each singular vector, though a sum can have more. Of ranks
    (R, 1, …) the terms of larger inner ranks are taken, largest first; of others the blocks of what is left over come
    next, for those filled up with zeros would stay zero in every sweep.
    """
    if len(ranks) > 1 and all(rank == 1 for rank in ranks[1:]):
        return largest_terms(tensor, ranks[0])
    most = min(len(tensor), tensor[0].numel())
    matrices = recursive_svd(tensor, (min(ranks[0], most), *ranks[1:]))
    while (missing := ranks[0] - len(matrices[0])) > 0:
        rest = tensor - contract(matrices, (len(matrices[0]), *ranks[1:]))
        added = recursive_svd(rest, (min(missing, most), *ranks[1:]))
        matrices = [torch.cat(pair) for pair in zip(matrices, added, strict=True)]
    return matrices


def largest_terms(tensor: Tensor, terms: int) -> list[Tensor]:
    """Return the largest terms of the untruncated recursive SVD as CP matrices (terms, n_k), to begin a fit with.

    The singular vectors are those of Gram matrices, whose smaller side is all that has to be decomposed.
    """
    columns: list[Tensor] = []
    rest = tensor[None]
    for _ in range(tensor.ndim - 1):
        nodes = rest.reshape(len(rest), rest.shape[1], -1)
        high, wide = nodes.shape[1:]
        if high <= wide:
            left = torch.linalg.eigh(nodes @ nodes.mT).eigenvectors
            right = left.mT @ nodes
        else:
            vectors = torch.linalg.eigh(nodes.mT @ nodes).eigenvectors
            scaled = nodes @ vectors
            norms = scaled.norm(dim=1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny)
            left, right = scaled / norms, norms.mT * vectors.mT
        kept = min(high, wide)
        columns = [column.repeat_interleave(kept, dim=0) for column in columns]
        columns.append(left.mT.reshape(-1, high))
        rest = right.reshape(-1, *rest.shape[2:])
    columns.append(rest.reshape(len(rest), -1))
    order = columns[-1].norm(dim=1).argsort(descending=True, stable=True)[:terms]
    chosen = [column[order] for column in columns]
    missing = terms - len(order)
    if missing > 0:  # more terms than the tensor needs: the fit is exact without them
        chosen = [torch.cat([column, column.new_zeros(missing, column.shape[1])]) for column in chosen]
    return chosen


def grow(tensor: Tensor, matrices: Sequence[Tensor], terms: int) -> list[Tensor]:
    """Add terms to a CP-like fit: the largest of what it leaves over. A warm start for the next rank."""
    rest = tensor - contract(matrices, (len(matrices[0]), *(1,) * (len(matrices) - 2)))
    added = largest_terms(rest, terms - len(matrices[0]))
    return [torch.cat(pair) for pair in zip(matrices, added, strict=True)]
