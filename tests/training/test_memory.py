import ctypes
import resource
import sys

import pytest
import torch

from kronsearch.training.memory import freed_memory_kept

CPU = torch.device("cpu")
IS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
SIZES = (2**20, 5 * 2**20, 2**21) * 10  # of floats, 320 MB together
PAGES = 4 * sum(SIZES) // resource.getpagesize()


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def faults():
    """Return how many pages the system hands out for buffers that are filled, and freed together as a step's are."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(size) for size in SIZES]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not IS_GLIBC, reason="the C library is another one")
def test_buffers_are_taken_from_what_was_freed_and_no_longer_so_afterwards():
    with freed_memory_kept(CPU):
        faults()
        assert faults() < PAGES / 10
    faults()
    if faults() > PAGES / 2:  # not where the system hands out large pages
        with freed_memory_kept(torch.device("cuda")):
            assert faults() > PAGES / 2


class Library:
    """Stands in for a C library."""

    gnu_get_libc_version = None

    def __init__(self):
        self.set = []

    def mallopt(self, parameter, value):
        self.set.append((parameter, value))


def test_it_is_put_back_though_a_step_fails(monkeypatch):
    library = Library()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with pytest.raises(ValueError, match="a step"), freed_memory_kept(CPU):
        raise ValueError("a step")
    assert library.set == [(-3, 2**25), (-1, -1), (-1, 2**26)]


def test_it_is_put_back_by_the_last_who_wants_it(monkeypatch):
    library, first, second = Library(), freed_memory_kept(CPU), freed_memory_kept("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert library.set == [(-3, 2**25), (-1, -1)]
    second.__exit__(None, None, None)
    assert library.set == [(-3, 2**25), (-1, -1), (-1, 2**26)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_holds(monkeypatch, name):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("it is asked for"))
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1048576" if name == "GLIBC_TUNABLES" else "1048576")
    with freed_memory_kept(CPU):
        pass


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept(CPU):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("it is asked for"))
    with freed_memory_kept(CPU):
        pass
