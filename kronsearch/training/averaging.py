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
        self._parameters: dict[Tensor, Tensor] = dict(zip(self.model.parameters(), trained.parameters(), strict=True))
        modules = zip(self.model.modules(), trained.modules(), strict=True)
        self._buffers = [(own._buffers, theirs._buffers) for own, theirs in modules]

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Draw the average near to the network after its step number `count`, counted from 1."""
        decay = min(self._decay, count / (count + 9))
        pairs = self._pairs()
        averaged = {own: theirs for own, theirs in pairs.items() if own.is_floating_point()}
        counts = {own: theirs for own, theirs in pairs.items() if own not in averaged}  # such as numbers of batches
        get_ema_multi_avg_fn(decay)(list(averaged), list(averaged.values()), count)  # type: ignore[no-untyped-call]
        if counts:
            torch._foreach_copy_(list(counts), list(counts.values()))

    def _pairs(self) -> dict[Tensor, Tensor]:
        """Return what each tensor follows; a module may have put another buffer, of other shape too, in one's place."""
        pairs = dict(self._parameters)
        for own, theirs in self._buffers:
            for name, tensor in theirs.items():
                known = own.get(name)
                if tensor is not None and known is not None and _alike(known, tensor):
                    pairs[known] = tensor
                else:
                    own[name] = None if tensor is None else tensor.clone()
        return pairs


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
