"""What one batch frees is there for the next one."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["freed_memory_kept"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)
_NO_TRIMMING = -1
# The most that glibc by itself adapts to. Larger buffers are the system's still: kept ones of like sizes don't fit into
# each other's place before glibc 2.38, and would fill the memory.
_LARGEST, _MOST_KEPT = 2**25, 2**26
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


_held = 0  # how many want it, for what they set is the process's


@contextmanager
def freed_memory_kept(device: torch.device | str) -> Iterator[None]:
    """Let the C library keep what is freed meanwhile, on the CPU and where it is glibc; else this does nothing.

    A batch frees what the one before had freed, too: all activations. What lies free at the end of the heap glibc gives
    back to the system, which hands out every page of the next buffer by itself, filled with zeros: of an evaluation of
    ResNet-20 180 pages an image, a fifth of its time. Afterwards glibc does what it comes to by itself in a process
    that has freed large buffers, which is not what it does in a new one: timings are taken with this, too. Where the
    environment says what glibc shall do (MALLOC_TRIM_THRESHOLD_ and the like), that holds.
    """
    global _held
    libc = _glibc() if torch.device(device).type == "cpu" else None
    if libc is None:
        yield
        return
    if _held == 0:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, _NO_TRIMMING)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _held == 0:
            libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and nobody has set it otherwise."""
    told = any(name in os.environ for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
