"""What a compressed network is worth: on the validation split while it is chosen, on the test split once at the end."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.data import Data
from kronsearch.training.evaluate import Evaluation, evaluate, outputs
from kronsearch.training.precision import KERNELS, precision_for

__all__ = ["Validation", "tested"]

_IMAGES = 2_500  # validation images at the most
_BATCH = 125  # small, so that the score's standard error comes from many batches
_TEACHER_ENTRIES = 2**27  # of the dense network's outputs that are kept, to tell the divergence from them


class Validation:
    """Evaluates networks on (a fixed subset of) the validation split, beside the dense one, whose outputs are kept.

    Args:
        dense: the network that others are compared with, on `device`.
        data: whose validation split is read.
        device: to run on.
    """

    def __init__(self, dense: nn.Module, data: Data, device: torch.device | str) -> None:
        self.data, self._device, self._precision = data, device, precision_for(device)

        def taken(limit: int) -> Tensor:
            return outputs(dense, data, "val", limit=limit, device=device, precision=self._precision)

        fits = taken(1).numel() * min(_IMAGES, data.size("val")) <= _TEACHER_ENTRIES
        self._wanted = taken(_IMAGES) if fits else None

    def __call__(self, model: nn.Module) -> Evaluation:
        """Evaluate a network; the divergence is None where the dense one's outputs would fill the memory."""
        with kernels_formed(model, KERNELS[self._precision]):
            return evaluate(
                model,
                self.data,
                "val",
                teacher_outputs=self._wanted,
                limit=_IMAGES,
                batch_size=_BATCH,
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
