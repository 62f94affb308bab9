"""The workers of a study: who they are, how they show that they live, and how others know that they are gone.

A worker that shares this machine is gone when its process is; of others only their signs of life tell. Each observer
times these by its own clock, so that no two clocks have to agree.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from optuna.trial import FrozenTrial, Trial

__all__ = ["BEAT", "WORKER", "Lookout", "Pulse", "is_gone", "new_worker"]

WORKER, BEAT = "worker", "beat"
_EVERY = 20.0  # seconds between two signs of life
_GRACE = 180.0  # seconds without one, after which a worker is taken for gone


def new_worker() -> dict[str, str]:
    """Return who this worker is: machine, process, when that began, and a name of its own."""
    return {"machine": _machine(), "pid": str(os.getpid()), "born": _born(os.getpid()) or "", "name": uuid.uuid4().hex}


def is_gone(worker: Mapping[str, str], me: Mapping[str, str]) -> bool:
    """Tell whether a worker is known to be gone: one of this machine whose process ended, or of this very process.

    A process has one worker at a time: what another one of its began has been given up.
    """
    if worker.get("machine") != me["machine"]:
        return False
    if worker.get("pid") == me["pid"]:
        return worker.get("name") != me["name"]
    pid = str(worker.get("pid"))
    return not pid.isdecimal() or _born(int(pid)) != worker.get("born")


class Pulse:
    """While it is open, the trial shows signs of life.

    Args:
        trial: that this worker runs.
        every: seconds between two signs.
    """

    def __init__(self, trial: Trial, every: float = _EVERY) -> None:
        self._trial, self._every = trial, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(self._every):
            beats += 1
            try:
                self._trial.set_user_attr(BEAT, beats)
            except Exception:  # whatever it is, the trial meets it too and tells it; here others just miss a sign
                continue


class Lookout:
    """Remembers when each trial last showed a sign of life.

    Args:
        grace: seconds without one, after which a trial counts as silent.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(self, grace: float = _GRACE, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def is_silent(self, trial: FrozenTrial) -> bool:
        """Tell whether a running trial has shown no sign of life for too long, as far as this lookout has seen."""
        sign, now = trial.user_attrs.get(BEAT), self._clock()
        last, since = self._seen.setdefault(trial.number, (sign, now))
        if sign != last:
            self._seen[trial.number] = (sign, now)
            return False
        return now - since > self._grace


def _machine() -> str:
    """Return what tells this machine from others, and is the same after it has been started again.

    Two machines may share a host name, and two containers that and the machine's id, but not the numbers of processes.
    """
    told = [socket.gethostname()]
    with suppress(OSError):
        told.append(Path("/etc/machine-id").read_text(encoding="utf-8").strip())
    with suppress(OSError):
        told.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(told)


def _born(pid: int) -> str | None:
    """Return when a process of this machine began, in the kernel's ticks; "" where that isn't told; None if it is gone.

    Numbers of processes are used again, so a number alone doesn't tell.
    """
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _alive(pid)
    state, *fields = told.rpartition(")")[2].split()  # the name before it, in brackets, may hold anything
    return None if state in ("Z", "X") else fields[18]


def _alive(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
