"""Random numbers: a generator for each purpose, so that what is drawn for one changes nothing for another."""

from enum import IntEnum, unique

import torch

__all__ = ["Purpose", "stream"]


@unique
class Purpose(IntEnum):
    """What random numbers are drawn for; the values are a part of what a seed means."""

    CALIBRATION = 1  # images that moments are gathered on
    SETTLING = 2  # images for statistics of batch norms
    FITTING = 3  # images that layers are fitted on, one after the other
    PROXY = 11  # batches of a finalist's fine-tune
    SENSITIVITY = 21  # images that layers' sensitivities are measured on
    FACTORS = 22  # of networks that are timed
    INPUTS = 23  # of networks that are timed
    BATCHES = 31  # of a fine-tune
    CONTEXT = 32  # images that contributions are measured on


def stream(seed: int, purpose: Purpose) -> torch.Generator:
    """Return the generator of one purpose: its numbers depend on nothing that was drawn for another."""
    return torch.Generator().manual_seed((seed * 1_000_003 + purpose) % 2**63)
