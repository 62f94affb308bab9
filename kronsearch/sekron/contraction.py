"""The sum of the outer products of factor matrices, and its gradient by each of them.

Of trees and of chains alike: factor k's rows are its parents' times its own rank, `(P_k, R_k, n_k)` in a tree, where
each parent has successors of its own, and `(R_{k-1}, R_k, n_k)` in a chain, where all share them. The innermost sums
are done first, as the terms are nested: of CP it is one product with its Khatri-Rao product.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["contract", "contract_and_pull"]


def contract(matrices: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Return the tensor (n_1, …, n_S) of factor matrices (rows of its own, n_k). Differentiable."""
    return contract_and_pull(matrices, ranks)[0]


def contract_and_pull(
    matrices: Sequence[Tensor], ranks: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Return what `contract` does, and what maps a gradient by it to those by the matrices.

    The second costs two products for each factor but the last, and none of what autograd adds to small ones.
    """
    tails = _tails(matrices, ranks)

    def pull(gradient: Tensor) -> list[Tensor]:
        found = []
        for matrix, rank, tail in zip(matrices, ranks, tails[1:], strict=False):
            nodes, after = _by_rank(matrix, rank), _by_rank(tail, rank)
            gradient = gradient.reshape(len(nodes), matrix.shape[1], -1)
            found.append((after @ gradient.mT).reshape(matrix.shape))
            gradient = (nodes @ gradient).sum_to_size(after.shape)
        return [*found, gradient.reshape(matrices[-1].shape)]

    return tails[0].reshape([matrix.shape[1] for matrix in matrices]), pull


def _tails(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Return for each factor what it and those after it come to, (rows that its parents select from, entries)."""
    tails = [matrices[-1]]
    for matrix, rank in zip(reversed(matrices[:-1]), reversed(ranks), strict=True):
        after = _by_rank(tails[0], rank)
        joined = matrix[:, :, None] * after if rank == 1 else _by_rank(matrix, rank).mT @ after
        tails.insert(0, joined.flatten(1))
    return tails


def _by_rank(matrix: Tensor, rank: int) -> Tensor:
    """View rows (parents · rank, n) as (parents, rank, n)."""
    return matrix.reshape(-1, rank, matrix.shape[1])
