"""How long the dense and the compressed network take on this machine: paired runs, whole and by replaced layer.

Memory isn't told: a process sees its own peak only, in which both networks and what the allocator keeps are mixed.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronsearch.errors import ModelError
from kronsearch.files import replacing
from kronsearch.models.apply import stream
from kronsearch.sekron.layers import SeKronLayer

__all__ = ["Layout", "Timing", "bench", "save_timings"]

Layout = Literal["contiguous", "channels_last"]
Run = Callable[[], object]

_WARMUP = 2  # runs of each before the first that counts
_FEWEST = 5  # pairs, however long they take
_MOST = 10_000  # pairs, however short they are
_INPUTS = 21  # stream of random numbers


@dataclass(frozen=True)
class Timing:
    """Dense against compressed: as many runs of each, taking turns.

    Args:
        layer: the replaced layer, "" for the whole network.
        batch: examples in a run.
        threads: of torch.
        dense_ms: median of the dense one's runs, milliseconds.
        compressed_ms: of the compressed one's.
        speedup: the median over the pairs of a dense run's time divided by that of the compressed run after it.
        speedup_low: the lower quartile of that.
        speedup_high: the upper quartile.
        pairs: how many.
        dense_layout: the memory layout that the dense network is faster in, and was timed in.
        compressed_layout: likewise.
    """

    layer: str
    batch: int
    threads: int
    dense_ms: float
    compressed_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    pairs: int
    dense_layout: Layout
    compressed_layout: Layout


def bench(
    dense: nn.Module,
    compressed: nn.Module,
    *,
    input_shape: tuple[int, ...],
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    seconds: float = 5.0,
    device: torch.device | str = "cpu",
) -> list[Timing]:
    """Time a dense network and a compressed one that was made of it, as they are run in eval mode without gradients.

    For each batch and number of threads, each network is first run in either memory layout and then timed in the one
    that it is faster in. Dense and compressed take turns, so that what else the machine does falls on both. The layers
    are timed likewise, on the inputs that they have in their network. Inputs are random; the networks aren't changed.

    Args:
        dense: the network.
        compressed: what `apply_plan` made of it, or `load_compressed`.
        input_shape: of one example.
        batches: how many examples a run has.
        threads: how many torch computes with; by default as many as it does now. Torch has this setting for the whole
            process: it is made here, and undone in the end.
        seconds: how long the whole networks are timed at each setting; all the layers together take as long again, and
            trying the layouts half of it. There are five pairs of runs at the least.
        device: to run on.

    Raises:
        ModelError: a network can't run on such inputs, or nothing of it is replaced.
    """
    if not any(isinstance(module, SeKronLayer) for module in compressed.modules()):
        raise ModelError("no layer of the compressed network is factorised: pass what a plan was applied to")
    ours, theirs = _Network(dense, device), _Network(compressed, device)
    now = torch.get_num_threads()
    found = []
    for count in (now,) if threads is None else threads:
        with _threads(count), torch.inference_mode():
            for batch in batches:
                with _as_model_error((batch, *input_shape)):
                    inputs = torch.randn(batch, *input_shape, generator=stream(0, _INPUTS)).to(device)
                    timings = _timings(ours, theirs, inputs, seconds)
                    found += [Timing(batch=batch, threads=count, **timed) for timed in timings]
    return found


def save_timings(timings: Sequence[Timing], path: Path) -> None:
    """Write timings as CSV, a row for each, all of them or nothing."""
    with replacing(path) as temporary:
        pd.DataFrame([asdict(timing) for timing in timings]).to_csv(temporary, index=False)


class _Network:
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
        times = _paired(self.run("contiguous", inputs), self.run("channels_last", inputs), seconds, inputs.device)
        return "channels_last" if np.median(times[:, 0] / times[:, 1]) > 1 else "contiguous"


def _timings(dense: _Network, compressed: _Network, inputs: Tensor, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the timings of the whole network and of each replaced layer: all but batch and threads."""
    our_layout, their_layout = (network.faster_layout(inputs, seconds / 4) for network in (dense, compressed))
    told = {"dense_layout": our_layout, "compressed_layout": their_layout}
    ours, theirs = dense.run(our_layout, inputs), compressed.run(their_layout, inputs)
    yield {"layer": "", **_summary(_paired(ours, theirs, seconds, inputs.device)), **told}
    large, small = dense.copies[our_layout], compressed.copies[their_layout]
    names = [name for name, module in small.named_modules() if isinstance(module, SeKronLayer)]
    our_calls, their_calls = _calls(large, names, ours), _calls(small, names, theirs)
    for name in our_calls:
        times = _paired(our_calls[name], their_calls[name], seconds / len(our_calls), inputs.device)
        yield {"layer": name, **_summary(times), **told}


def _calls(network: nn.Module, names: Sequence[str], run: Run) -> dict[str, Run]:
    """Return by name what does again all calls that a run makes of a layer."""
    seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.setdefault(name, []).append((args, kwargs))

    handles = [network.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    def again(name: str) -> Run:
        layer, calls = network.get_submodule(name), seen[name]
        return lambda: [layer(*args, **kwargs) for args, kwargs in calls]

    return {name: again(name) for name in seen}


def _paired(first: Run, second: Run, seconds: float, device: torch.device) -> NDArray[np.float64]:
    """Return the seconds of runs that take turns, (pairs, 2), for so long, after a warm-up."""
    for _ in range(_WARMUP):
        _seconds(first, device)
        _seconds(second, device)
    began = time.perf_counter()
    times: list[tuple[float, float]] = []
    while len(times) < _FEWEST or (time.perf_counter() - began < seconds and len(times) < _MOST):
        times.append((_seconds(first, device), _seconds(second, device)))
    return np.array(times)


def _seconds(run: Run, device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":  # which has only been given its work
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _summary(times: NDArray[np.float64]) -> dict[str, float]:
    dense, compressed = 1e3 * np.median(times, axis=0)
    low, middle, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75))
    return {
        "dense_ms": float(dense),
        "compressed_ms": float(compressed),
        "speedup": float(middle),
        "speedup_low": float(low),
        "speedup_high": float(high),
        "pairs": len(times),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _as_model_error(shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the network can't run on inputs of shape {shape} ({reason}): pass a smaller --batch, and to "
            "`kronsearch.bench` the input_shape that the network was made for"
        ) from error
