"""The average of a network's weights over its last training steps."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kronsearch.training.copies import copied

__all__ = ["Average"]


class Average:
    """A network whose weights and running statistics follow, as exponential averages, those of one in training.

    The n-th average takes 1 - min(decay, n / (n + 9)) from the trained network, so that in short runs, too, what the
    training began with is forgotten. `model` is the average, in eval mode.

    Args:
        trained: as it is before the first step.
        decay: in [0, 1).
    """

    def __init__(self, trained: nn.Module, decay: float) -> None:
        self.model = copied(trained).eval().requires_grad_(requires_grad=False)
        self._decay = decay
        pairs = list(zip(_tensors(self.model), _tensors(trained), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # such as numbers of batches

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Draw the average near to the network after its step number `count`, counted from 1."""
        decay = min(self._decay, count / (count + 9))
        own, theirs = ([pair[k] for pair in self._averaged] for k in (0, 1))
        get_ema_multi_avg_fn(decay)(own, theirs, count)  # type: ignore[no-untyped-call]
        if self._copied:
            torch._foreach_copy_([own for own, _ in self._copied], [theirs for _, theirs in self._copied])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
