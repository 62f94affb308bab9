"""Working through what is wanted of a study, alone or beside other workers."""

import time
from collections.abc import Callable, Mapping, Sequence

from optuna.trial import Trial

from kronsearch.search.study import Slot, Study

__all__ = ["share"]

_PATIENCE = 1.0  # seconds between two looks at what other workers do


def share(
    ledger: Study,
    slots: Sequence[Slot],
    run: Callable[[Trial], None],
    waits: Callable[[int, int], None],
    *,
    given: Callable[[Slot], Mapping[str, float] | None] = lambda _: None,
    ends: float | None = None,
) -> None:
    """Run, or wait for others to run, what is left of these slots.

    Args:
        ledger: their study.
        slots: the trials that there shall be in the end.
        run: brings a trial to its end.
        waits: is told, once for each that ends, that others run so many trials, and how many of the slots are finished.
        given: maps a slot to parameters that are set beforehand, or to None.
        ends: the moment, by the monotonic clock, after which none is begun if one at least is finished.
    """
    told = None
    while left := ledger.left(slots):
        done = len(slots) - len(left)
        late = bool(done) and ends is not None and time.monotonic() > ends
        trial = None if late else ledger.ask(slots, given)
        if trial is not None:
            with ledger.at_work(trial):
                run(trial)
        elif others := ledger.others():  # the winner is chosen among all trials, theirs too
            if done != told:
                waits(len(others), done)
                told = done
            time.sleep(_PATIENCE)
        elif late:
            break
