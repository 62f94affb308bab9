"""What a search tells whoever watches it. Nothing here prints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Phase", "Progress", "Watcher", "ignore"]

Phase = Literal["profile", "calibrate", "tables", "latency", "budgets", "trials", "final", "test"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step of a search or a sweep.

    Args:
        phase: what is being done.
        done: how much of it is done, in units of `total`.
        total: how much there is.
        message: what was just done, in a few words.
        best: the best trial's score so far.
        macs: MACs of the plan in hand.
        params: parameters of the plan in hand.
    """

    phase: Phase
    done: int
    total: int
    message: str = ""
    best: float | None = None
    macs: int | None = None
    params: int | None = None


Watcher = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Watch nothing."""
    del progress
