"""Chains of factors: tensor trains on the unfolded kernel (Oseledets, 2011).

A chain's factor matrices are cores `(R_{k-1}, R_k, n_k)`, the edges' ranks being 1, with the two ranks flattened into
the rows. The truncated SVDs from left to right give a start; then each core in turn is the optimum for the others
fixed, which are kept orthonormal, so that it is a projection and the squared error is what the core's norm leaves of
the tensor's: higher-order orthogonal iteration for S = 3, where a chain is Tucker-2 (De Lathauwer et al., 2000).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronsearch.sekron.contraction import contract

__all__ = ["as_cores", "balance_chain", "chain_squares", "fit_chain"]

_SWEEPS = 100
_TOLERANCE = 1e-6  # of the squared error from one sweep to the next: they are cheap, and converge linearly


def as_cores(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """View factor matrices (ranks of its own, n_k) as cores (R_{k-1}, R_k, n_k)."""
    edges = (1, *ranks, 1)
    return [m.reshape(edges[k], edges[k + 1], m.shape[-1]) for k, m in enumerate(matrices)]


def _append(left: Tensor, core: Tensor) -> Tensor:
    """Extend (entries, R_{k-1}) by a core to (entries · n_k, R_k)."""
    wide = left @ core.flatten(1)
    return wide.reshape(len(left), *core.shape[1:]).transpose(1, 2).reshape(-1, core.shape[1])


def _prepend(core: Tensor, right: Tensor) -> Tensor:
    """Extend (R_k, entries) by a core to (R_{k-1}, n_k · entries)."""
    return (core.transpose(1, 2) @ right).flatten(1)


def fit_chain(tensor: Tensor, ranks: Sequence[int], *, refine: bool = True) -> tuple[list[Tensor], float]:
    """Fit a chain to a tensor (n_1, …, n_S).

    Args:
        tensor: the unfolded kernel.
        ranks: (R_1, …, R_{S-1}), none above its unfolding's smaller side.
        refine: whether to fit the cores together after the truncated SVDs.

    Returns:
        Factor matrices (R_{k-1}·R_k, n_k), and the relative squared error.
    """
    cores = _truncated(tensor, ranks)
    energy = float(tensor.square().sum())
    if energy > 0 and refine and len(cores) > 1:
        squared = 1.0
        for _ in range(_SWEEPS):
            before, squared = squared, _sweep(tensor, cores) / energy
            if before - squared < _TOLERANCE * max(squared, _TOLERANCE):
                break
    matrices = [core.flatten(0, 1) for core in cores]
    error = float((tensor - contract(matrices, ranks)).square().sum())
    return matrices, error / energy if energy > 0 else 0.0


def _truncated(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the cores of the truncated SVDs, all but the last with orthonormal columns (R_{k-1}·n_k, R_k)."""
    cores, rest, before = [], tensor, 1
    for extent, rank in zip(tensor.shape[:-1], ranks, strict=True):
        left, values, right = torch.linalg.svd(rest.reshape(before * extent, -1), full_matrices=False)
        left, rest = _padded(left[:, :rank], rank, 1), _padded(values[:rank, None] * right[:rank], rank, 0)
        cores.append(left.reshape(before, extent, rank).transpose(1, 2))
        before = rank
    cores.append(rest.reshape(before, 1, -1))
    return cores


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Fill a dimension up with zeros."""
    return pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, size - tensor.shape[dim]])


def _right_orthonormal(core: Tensor) -> tuple[Tensor, Tensor]:
    """Return a core (R_{k-1}, R_k, n_k) as one with orthonormal rows, where it has as many, and their mixture."""
    rows = core.transpose(1, 2)
    upper = torch.linalg.qr(rows.flatten(1).T)
    orthonormal = _padded(upper.Q.T, len(core), 0).reshape(rows.shape).transpose(1, 2)
    return orthonormal, _padded(upper.R.T, len(core), 1)


def _sweep(tensor: Tensor, cores: list[Tensor]) -> float:
    """Replace every core but the first by its optimum from right to left, then all from left to right, in place.

    Before and after, all cores but the last have orthonormal columns. Returns the squared error.
    """
    last = len(cores) - 1
    lefts = [tensor.new_ones(1, 1)]
    for core in cores[:-1]:
        lefts.append(_append(lefts[-1], core))
    rights = [tensor.new_ones(1, 1)]
    for k in range(last, 0, -1):
        cores[k], _ = _right_orthonormal(_optimum(tensor, lefts[k], rights[0], cores[k].shape[-1]))
        rights.insert(0, _prepend(cores[k], rights[0]))
    left = lefts[0]
    for k in range(last):
        core = _optimum(tensor, left, rights[k], cores[k].shape[-1])
        columns = _padded(torch.linalg.qr(core.transpose(1, 2).flatten(0, 1)).Q, core.shape[1], 1)
        cores[k] = columns.reshape(core.shape[0], core.shape[2], core.shape[1]).transpose(1, 2)
        left = _append(left, cores[k])
    cores[last] = _optimum(tensor, left, rights[last], cores[last].shape[-1])
    return float(tensor.square().sum() - cores[last].square().sum())


def _optimum(tensor: Tensor, left: Tensor, right: Tensor, extent: int) -> Tensor:
    """Project the tensor on orthonormal neighbours: left (entries, R_{k-1}), right (R_k, entries)."""
    inner = left.T @ tensor.reshape(len(left), -1)
    inner = inner.reshape(left.shape[1] * extent, -1) @ right.T
    return inner.reshape(left.shape[1], extent, -1).transpose(1, 2)


def balance_chain(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Divide the singular values of every bond evenly between its two factors, and give all factors equal norms.

    The tensor stays what it is. A bond's directions without a singular value are carried on to the last factor, which
    alone is zero there: a training can find a use for them.
    """
    cores = as_cores(matrices, ranks)
    carried = cores[-1].new_ones(1, 1)
    for k in range(len(cores) - 1, 0, -1):  # right-orthonormal
        cores[k], carried = _right_orthonormal((cores[k].transpose(1, 2) @ carried).transpose(1, 2))
    cores[0] = (cores[0].transpose(1, 2) @ carried).transpose(1, 2)
    bonds = [cores[0].new_ones(1)]
    for k in range(len(cores) - 1):
        columns = cores[k].transpose(1, 2).flatten(0, 1)
        left, values, right = torch.linalg.svd(columns, full_matrices=False)
        width = columns.shape[1]
        left, values, right = _padded(left, width, 1), _padded(values, width, 0), _padded(right, width, 0)
        cores[k] = left.reshape(len(cores[k]), -1, width).transpose(1, 2)
        following = cores[k + 1]
        cores[k + 1] = (values[:, None] * right @ following.flatten(1)).reshape(following.shape)
        bonds.append(values)
    bonds.append(cores[0].new_ones(1))
    roots = [_filled(values).sqrt() for values in bonds]
    for k, core in enumerate(cores):
        cores[k] = core * roots[k + 1][None, :, None] / roots[k][:, None, None]
    norms = torch.stack([core.norm() for core in cores])
    if bool((norms > 0).all()):
        cores = [core * (norms.log().mean().exp() / norm) for core, norm in zip(cores, norms, strict=True)]
    return [core.flatten(0, 1) for core in cores]


def _filled(values: Tensor) -> Tensor:
    """Put the largest of singular values, or 1, in the place of those that are rounding."""
    most = values.max()
    most = most if most > 0 else torch.ones_like(most)
    return torch.where(values > torch.finfo(values.dtype).eps * most, values, most)


def chain_squares(tensor: Tensor) -> Tensor:
    """Return the squared errors of the truncated SVDs of a tensor (n_1, n_2, n_3) at all ranks.

    Returns:
        (K_1, K_2), entry (R_1 - 1, R_2 - 1); K_1 and K_2 are the smaller sides of the two unfoldings. Ranks above
        R_1·n_2 change nothing there.
    """
    high, middle, wide = tensor.shape
    _, values, right = torch.linalg.svd(tensor.reshape(high, -1), full_matrices=False)
    squares = values.square()
    dropped = squares.flip(0).cumsum(0).flip(0)
    first = torch.cat([dropped[1:], dropped.new_zeros(1)])  # what R_1 = 1, 2, … leave
    nodes = (values[:, None] * right).reshape(-1, middle, wide)
    grams = (nodes.mT @ nodes).cumsum(0)  # (K_1, n_3, n_3): of the first R_1 nodes together
    second = torch.linalg.eigvalsh(grams).clamp_min(0)  # ascending
    tails = torch.cat([second.new_zeros(len(second), 1), second.cumsum(1)[:, :-1]], 1).flip(
        1
    )  # what R_2 = 1, 2, … leave
    return (first[:, None] + tails)[:, : min(high * middle, wide)]
