"""How much memory a network and one run of it take."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kronsearch.training.copies import copied

__all__ = ["peak_memory"]

_CPU = 0  # as the profiler numbers kinds of devices


def peak_memory(network: nn.Module, inputs: Tensor) -> int:
    """Return the most bytes of tensors at a time in the first run of a network, without its inputs.

    They are its parameters and buffers, what the run allocates through torch, and what a factorised layer keeps of that
    for the runs to come; not what libraries take from elsewhere. The network isn't changed.

    Args:
        network: on the inputs' device.
        inputs: which it can run on.
    """
    with torch.inference_mode(False):  # in which layers would keep nothing of such copies
        network = copied(network)  # without what layers have kept of earlier runs
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    most = _most_on_cuda if inputs.device.type == "cuda" else _most_on_cpu
    return held + most(lambda: network(inputs), inputs.device)


def _most_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _most_on_cpu(run: Callable[[], object], _: torch.device) -> int:
    """Add up the allocations and releases in the order of their times, as the profiler writes them down."""
    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == _CPU]
    taken = most = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        taken += event["args"]["Bytes"]
        most = max(most, taken)
    return int(most)


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Keep the profiler from writing to stderr that it begins, and that there is no GPU."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "9")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
