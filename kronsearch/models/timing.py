"""What timing is made of: runs that take turns, memory layouts, and the conditions that all of them have."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronsearch.errors import ModelError, first_line
from kronsearch.training.copies import copied
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.streams import Purpose, stream

__all__ = [
    "LAYOUTS",
    "Clock",
    "Layout",
    "Network",
    "Run",
    "as_model_error",
    "device_name",
    "paired",
    "random_inputs",
    "seconds_of",
    "timing_conditions",
    "wait_for",
]

Layout = Literal["contiguous", "channels_last"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
Run = Callable[[], object]
Clock = Callable[[], float]

_WARMUP = 2  # runs of each before the first that counts
_FEWEST = 5  # pairs, however long they take
_MOST = 10_000  # pairs, however short they are


class Network:
    """A copy of a network in each memory layout."""

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.copies: dict[Layout, nn.Module] = {"contiguous": copied(network).to(device).eval()}
        if not any(isinstance(module, nn.Conv3d) for module in network.modules()):  # torch refuses its weight
            last = copied(network).to(device).eval()
            self.copies["channels_last"] = last.to(memory_format=torch.channels_last)

    def run(self, layout: Layout, inputs: Tensor) -> Run:
        """Return what runs the copy of a layout on inputs in that layout."""
        network, inputs = self.copies[layout], self.lay_out(layout, inputs)
        return lambda: network(inputs)

    def lay_out(self, layout: Layout, inputs: Tensor) -> Tensor:
        """Return inputs in a layout, of the dtype of the network's parameters."""
        if layout == "channels_last":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        parameters = self.copies["contiguous"].parameters()
        return inputs.to(next((p.dtype for p in parameters if p.is_floating_point()), inputs.dtype))

    def faster_layout(self, inputs: Tensor, seconds: float, *, clock: Clock = time.perf_counter) -> Layout:
        """Return the layout in which the network is faster on such inputs: images only have more than one."""
        if inputs.dim() != 4 or len(self.copies) == 1:
            return "contiguous"
        plain, last = (self.run(layout, inputs) for layout in LAYOUTS)
        times = paired(plain, last, seconds, inputs.device, clock=clock)
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


def device_name(device: torch.device) -> str:
    """Return what a device is called: what is measured on another one says nothing about this one."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            name = next(names, platform.processor())
    except OSError:
        name = platform.processor()
    return f"{device.type} {name or platform.machine()}, {os.cpu_count()} cores"


def random_inputs(*shape: int, device: torch.device | str) -> Tensor:
    """Return the random inputs that networks are timed on, (batch, *input shape); as tokens, all are the first."""
    return torch.rand(*shape, generator=stream(0, Purpose.INPUTS)).to(device)


@contextmanager
def timing_conditions(threads: int, device: torch.device | str) -> Iterator[None]:
    """Let torch compute with so many threads, and freed memory be kept, whatever ran before; and undo that."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with freed_memory_kept(device):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def as_model_error(shape: tuple[int, ...]) -> Iterator[None]:
    """Turn what torch says of inputs that a network can't run on into one line."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        reason = first_line(error)
        raise ModelError(
            f"the network can't run on inputs of shape {shape} ({reason}): pass a smaller batch, and the "
            "input shape that the network was made for"
        ) from error
