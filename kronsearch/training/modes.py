"""Torch's modes, in which a caller may be for reasons of their own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from kronsearch.errors import TrainingError

__all__ = ["own_modes"]


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute with gradients where they are asked for and without autocast, as outside of all modes; a decorator, too.

    Raises:
        TrainingError: the caller is in inference mode, of whose tensors there can never be gradients.
    """
    if torch.is_inference_mode_enabled():
        raise TrainingError(
            "networks can't be compressed or trained within torch.inference_mode(): call it outside, or within "
            "torch.no_grad()"
        )
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
