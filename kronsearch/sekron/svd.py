"""Recursive truncated SVD of an unfolded kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["recursive_svd"]


def recursive_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Decompose a tensor (n_1, …, n_S) by one truncated SVD at each node (Hameed et al., SeKron, 2022, algorithm 1).

    Optimal for two factors (Eckart and Young, 1936), stage by stage only for more. Ranks above what a node has are
    filled up with zeros. The norm of a term lies in its last factor.

    Returns:
        Factor matrices (R_1…R_min(k, S-1), n_k).
    """
    matrices, rest = [], tensor[None]
    for rank in ranks:
        nodes = rest.reshape(len(rest), rest.shape[1], -1)
        left, values, right = torch.linalg.svd(nodes, full_matrices=False)
        kept = min(rank, values.shape[-1])
        left = left[..., :kept].transpose(1, 2)
        right = values[:, :kept, None] * right[:, :kept]
        if kept < rank:
            left, right = (pad(part, (0, 0, 0, rank - kept)) for part in (left, right))
        matrices.append(left.reshape(-1, left.shape[-1]))
        rest = right.reshape(-1, *rest.shape[2:])
    return [*matrices, rest.reshape(len(rest), -1)]
