"""Torch's global random numbers, for what draws from nowhere else (dropout)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["own_randomness"]


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Let what draws from the global generators draw from a seed, and put them back after."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
