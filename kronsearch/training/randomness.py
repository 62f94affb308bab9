"""Torch's global random numbers, for what draws from nowhere else (dropout)."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["host_randomness", "own_randomness"]


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


def host_randomness() -> tuple[object, ...]:
    """Return where the host's global generators stand, torch's, Python's and NumPy's: alike if nothing was drawn."""
    numpys = json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist())  # noqa: NPY002 -- no draw
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), numpys
