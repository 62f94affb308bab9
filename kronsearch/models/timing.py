"""What timing is made of: runs that take turns, memory layouts, and the number of threads."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronsearch.models.apply import stream

__all__ = ["Clock", "Layout", "Network", "Run", "paired", "random_inputs", "seconds_of", "threads_set", "wait_for"]

Layout = Literal["contiguous", "channels_last"]
Run = Callable[[], object]
Clock = Callable[[], float]

_WARMUP = 2  # runs of each before the first that counts
_FEWEST = 5  # pairs, however long they take
_MOST = 10_000  # pairs, however short they are
_INPUTS = 21  # stream of random numbers


class Network:
    """A copy of a network in each memory layout."""

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.copies: dict[Layout, nn.Module] = {"contiguous": copy.deepcopy(network).to(device).eval()}
        if not any(isinstance(module, nn.Conv3d) for module in network.modules()):  # torch refuses its weight
            last = copy.deepcopy(network).to(device).eval()
            self.copies["channels_last"] = last.to(memory_format=torch.channels_last)

    def run(self, layout: Layout, inputs: Tensor) -> Run:
        """Return what runs the copy of a layout on inputs in that layout."""
        network = self.copies[layout]
        if layout == "channels_last":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), inputs.dtype)
        inputs = inputs.to(dtype)
        return lambda: network(inputs)

    def faster_layout(self, inputs: Tensor, seconds: float) -> Layout:
        """Return the layout in which the network is faster on such inputs: images only have more than one."""
        if inputs.dim() != 4 or len(self.copies) == 1:
            return "contiguous"
        times = paired(self.run("contiguous", inputs), self.run("channels_last", inputs), seconds, inputs.device)
        return "channels_last" if np.median(times[:, 0] / times[:, 1]) > 1 else "contiguous"


def paired(
    first: Run, second: Run, seconds: float, device: torch.device, *, clock: Clock = time.perf_counter
) -> NDArray[np.float64]:
    """Return the seconds of runs that take turns, (pairs, 2), for so long, after a warm-up."""
    for _ in range(_WARMUP):
        seconds_of(first, device, clock)
        seconds_of(second, device, clock)
    began = clock()
    times: list[tuple[float, float]] = []
    while len(times) < _FEWEST or (clock() - began < seconds and len(times) < _MOST):
        times.append((seconds_of(first, device, clock), seconds_of(second, device, clock)))
    return np.array(times)


def seconds_of(run: Run, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return how long a run takes."""
    began = clock()
    run()
    wait_for(device)
    return clock() - began


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_inputs(batch: int, input_shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return the random inputs that networks are timed on, (batch, *input shape)."""
    return torch.randn(batch, *input_shape, generator=stream(0, _INPUTS)).to(device)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and undo that."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
