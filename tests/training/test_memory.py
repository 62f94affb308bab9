import ctypes
import resource
import sys

import pytest
import torch

from kronsearch.models.bench import bench
from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.statistics import gather_moments
from kronsearch.sekron import SeKronSpec
from kronsearch.training.batchnorm import reestimate_batchnorm
from kronsearch.training.evaluate import evaluate, outputs
from kronsearch.training.finetune import Trainer
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.schedule import TrainSettings

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
def test_buffers_are_taken_from_what_was_freed():
    with freed_memory_kept(CPU):
        faults()
        assert faults() < PAGES / 10


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


def passes(data, network):
    """Yield what runs data through a network or times one, by names."""
    generator = torch.Generator().manual_seed(0)
    yield "evaluate", lambda: evaluate(network, data, "val")
    yield "outputs", lambda: outputs(network, data, "val")
    yield "batch norms", lambda: reestimate_batchnorm(network, data, images=10, generator=generator)
    yield "statistics", lambda: gather_moments(network, data, [], images=10, generator=generator)
    small = replace_layers(network, {"conv": factorise(network.conv, SeKronSpec(((4, 1, 1, 1), (1, 2, 3, 3)), (1,)))})
    yield "bench", lambda: bench(network, small, input_shape=data.input_shape, seconds=0.01, layers=False)

    def train():
        with Trainer(network, data, TrainSettings(epochs=1, batch_size=10), generator=generator) as trainer:
            trainer.advance(1)

    yield "training", train


def test_passes_over_data_keep_it_and_let_it_go(monkeypatch, make_data, make_network):
    library = Library()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name, run in passes(make_data(), make_network()):
        library.set.clear()
        run()
        assert library.set[:2] == [(-3, 2**25), (-1, -1)], name
        assert library.set[-1] == (-1, 2**26), name


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


def test_other_libraries_and_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept(CPU):
        pass
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("it is asked for"))
    with freed_memory_kept("cuda:1"):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept(CPU):
        pass
