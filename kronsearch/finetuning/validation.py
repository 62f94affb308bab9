"""What a compressed network is worth: on other splits while it is chosen, on the test split once at the end."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.data import Data, Split
from kronsearch.training.evaluate import Evaluation, evaluate, outputs
from kronsearch.training.precision import KERNELS, precision_for
from kronsearch.training.schedule import TEMPERATURE

__all__ = ["Validation", "tested"]

_IMAGES = 5_000  # validation images at the most, unless more are asked for
_SMALLEST, _LARGEST, _BATCHES = 8, 125, 40  # of batches: the score's standard error comes from them
_TEACHER_ENTRIES = 2**27  # of the dense network's outputs that are kept, to tell the divergence from them


class Validation:
    """Evaluates networks on (a fixed subset of) a split beside the dense one, whose outputs are kept.

    How far a network diverges from the dense one is told of outputs softened as in training: at a temperature of 1 a
    few images that the dense network is wrongly sure of decide. Of 25 plans of ResNet-20 at two budgets the divergence
    on the test split correlates with it by 0.84, with the one at 1 by 0.79; and a tenth less of that was a thirtieth
    less on the test split, where of the softened one it is half of it.

    Args:
        dense: the network that others are compared with, on `device`.
        data: whose split is read.
        device: to run on.
        split: which.
        limit: how many examples at the most.
    """

    def __init__(
        self, dense: nn.Module, data: Data, device: torch.device | str, *, split: Split = "val", limit: int = _IMAGES
    ) -> None:
        self.data, self._device, self._precision = data, device, precision_for(device)
        self._split, self._limit = split, limit

        def taken(limit: int) -> Tensor:
            return outputs(dense, data, split, limit=limit, device=device, precision=self._precision)

        images = min(limit, data.size(split))
        self._batch = min(_LARGEST, max(_SMALLEST, images // _BATCHES))
        fits = taken(1).numel() * images <= _TEACHER_ENTRIES
        self._wanted = taken(limit) if fits else None

    def __call__(self, model: nn.Module) -> Evaluation:
        """Evaluate a network; the divergence is None where the dense one's outputs would fill the memory."""
        with kernels_formed(model, KERNELS[self._precision]):
            return evaluate(
                model,
                self.data,
                self._split,
                teacher_outputs=self._wanted,
                temperature=TEMPERATURE,
                limit=self._limit,
                batch_size=self._batch,
                device=self._device,
                precision=self._precision,
            )


def tested(
    dense: nn.Module, small: nn.Module, data: Data, device: torch.device | str, tell: Callable[[int], None]
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the dense and the compressed network on the test split; `tell` is called with how many are done."""
    tell(0)
    first = evaluate(dense, data, "test", device=device)
    tell(1)
    second = evaluate(small, data, "test", device=device)
    tell(2)
    return first, second
