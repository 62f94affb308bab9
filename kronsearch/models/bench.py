"""How long the dense and the compressed network take on this machine, and how much memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronsearch.choices import check_counts
from kronsearch.errors import ModelError
from kronsearch.files import replacing
from kronsearch.models.memory import peak_memory
from kronsearch.models.timing import (
    Clock,
    Layout,
    Network,
    Run,
    as_model_error,
    paired,
    random_inputs,
    timing_conditions,
)
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.training.copies import check_network
from kronsearch.training.precision import require_device

__all__ = ["Timing", "bench", "save_timings"]


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
        dense_bytes: of the whole network and a run of it (see `peak_memory`); None for a layer.
        compressed_bytes: likewise.
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
    dense_bytes: int | None = None
    compressed_bytes: int | None = None


def bench(
    dense: nn.Module,
    compressed: nn.Module,
    *,
    input_shape: tuple[int, ...],
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    seconds: float = 5.0,
    layers: bool = True,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Time a dense network and a compressed one that was made of it, as they are run in eval mode without gradients.

    For each batch and number of threads, each network is first run in either memory layout and then timed in the one
    that it is faster in. Dense and compressed take turns, so that what else the machine does falls on both. The layers
    are timed likewise, on the inputs that they have in their network. Memory is measured in a run of its own. Inputs
    are random; the networks aren't changed.

    Args:
        dense: the network.
        compressed: what `apply_plan` made of it, or `load_compressed`.
        input_shape: of one example.
        batches: how many examples a run has.
        threads: how many torch computes with; by default as many as it does now. Torch has this setting for the whole
            process: it is made here, and undone in the end.
        seconds: how long the whole networks are timed at each setting; all the layers together take as long again, and
            trying the layouts half of it. There are five pairs of runs at the least.
        layers: whether the layers are timed, too.
        device: to run on.
        clock: seconds of a clock that only goes forward.

    Raises:
        ModelError: a network can't run on such inputs, or nothing of it is replaced.
        StudyError: a batch or a number of threads is no whole number above zero.
    """
    for network in (dense, compressed):
        check_network(network)
    if not any(isinstance(module, SeKronLayer) for module in compressed.modules()):
        raise ModelError("no layer of the compressed network is factorised: pass what a plan was applied to")
    for batch, count in product(batches, (1,) if threads is None else threads):
        check_counts(batch=batch, threads=count)
    require_device(device)
    ours, theirs = Network(dense, device), Network(compressed, device)
    now = torch.get_num_threads()
    found = []
    for count in (now,) if threads is None else threads:
        with timing_conditions(count, device), torch.inference_mode():
            for batch in batches:
                with as_model_error((batch, *input_shape)):
                    inputs = random_inputs(batch, *input_shape, device=device)
                    timings = islice(_timings(ours, theirs, inputs, seconds, clock), None if layers else 1)
                    found += [Timing(batch=batch, threads=count, **timed) for timed in timings]
    return found


def save_timings(timings: Sequence[Timing], path: Path) -> None:
    """Write timings as CSV, a row for each, all of them or nothing."""
    with replacing(path) as temporary:
        pd.DataFrame([asdict(timing) for timing in timings]).to_csv(temporary, index=False)


def _timings(
    dense: Network, compressed: Network, inputs: Tensor, seconds: float, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Yield the timings of the whole network and of each replaced layer: all but batch and threads."""
    our_layout, their_layout = (
        network.faster_layout(inputs, seconds / 4, clock=clock) for network in (dense, compressed)
    )
    told = {"dense_layout": our_layout, "compressed_layout": their_layout}
    memory = {
        "dense_bytes": peak_memory(dense.copies[our_layout], dense.lay_out(our_layout, inputs)),
        "compressed_bytes": peak_memory(compressed.copies[their_layout], compressed.lay_out(their_layout, inputs)),
    }
    ours, theirs = dense.run(our_layout, inputs), compressed.run(their_layout, inputs)
    yield {"layer": "", **_summary(paired(ours, theirs, seconds, inputs.device, clock=clock)), **told, **memory}
    large, small = dense.copies[our_layout], compressed.copies[their_layout]
    names = [name for name, module in small.named_modules() if isinstance(module, SeKronLayer)]
    our_calls, their_calls = _calls(large, names, ours), _calls(small, names, theirs)
    for name in our_calls:
        times = paired(our_calls[name], their_calls[name], seconds / len(our_calls), inputs.device, clock=clock)
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
