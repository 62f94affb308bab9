"""What a search or a fine-tune tells whoever watches it. Nothing here prints."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Phase", "PhaseClock", "Progress", "Watcher", "ignore"]

Phase = Literal[
    "profile",
    "calibrate",
    "tables",
    "sensitivity",
    "context",
    "latency",
    "budgets",
    "trials",
    "finalists",
    "final",
    "apply",
    "finetune",
    "test",
]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step of a search, a sweep or a fine-tune.

    Args:
        phase: what is being done.
        done: how much of it is done, in units of `total`.
        total: how much there is.
        message: what was just done, in a few words.
        best: what the best trial came to so far, in what trials minimise; in a fine-tune, the kept network's score.
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


class PhaseClock:
    """Passes each step on, and adds up the seconds of each phase: from its steps to those that follow, or to now.

    Args:
        watch: whom the steps are passed on to.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(self, watch: Watcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._clock = watch, clock
        self._last: tuple[Phase, float] | None = None
        self._ended: dict[Phase, float] = {}

    def __call__(self, progress: Progress) -> None:
        """Note the time of a step."""
        now = self._clock()
        self._ended = self._until(now)
        self._last = (progress.phase, now)
        self._watch(progress)

    @property
    def seconds(self) -> dict[Phase, float]:
        """Seconds of each phase so far."""
        return self._until(self._clock())

    def _until(self, now: float) -> dict[Phase, float]:
        if self._last is None:
            return {}
        phase, since = self._last
        return self._ended | {phase: self._ended.get(phase, 0.0) + now - since}


def ignore(progress: Progress) -> None:
    """Watch nothing."""
    del progress
