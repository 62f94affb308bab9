"""Cutting a labelled set in two."""

import torch
from torch import Tensor

__all__ = ["stratified_split"]


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending indices of the kept and of the held-out examples; `fraction` of every class is held out.

    The number held out of a class is rounded, but of a class with two or more examples both parts get at least one.
    `labels` are int64 (N,). Deterministic in the labels and the seed; the global generator is not used.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held: list[Tensor] = []
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held.append(members[:count])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()
