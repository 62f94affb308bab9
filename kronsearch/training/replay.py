"""A step's work on a CUDA device, recorded once and played back: the host issues one graph, not a thousand kernels."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronsearch.errors import first_line
from kronsearch.training.randomness import host_randomness

__all__ = ["Replay"]

_EAGER = 3  # calls before one is recorded: what is made at the first ones, such as the optimizer's state, is there then
_WAITS, _NOTICE = "called a synchronizing CUDA operation", "Synchronization debug mode is a prototype"  # torch's words


class Replay:
    """Work whose result depends on its inputs and on what lies in memory, and that does the same at every call.

    It runs as it is for a few calls, and is then recorded as a CUDA graph. A step of a small network is a thousand
    kernels of a few microseconds, and to issue them from Python takes longer than to run them. In the last of those
    calls it is seen, and refused, if the work waits for the device, draws from the host's global generators, changes
    numbers or words that are attributes of the network's modules, or puts other tensors in the place of their buffers;
    what else it does on the host is not seen. Inputs of other shapes run as they are, and all does if recording fails.

    It must be called with the same stream current each time, which isn't the device's default one.

    Args:
        work: takes tensors and returns one.
        network: that the work runs.
        undo: undoes what work that was recorded, but not run, has left behind on the host.

    Attributes:
        refusal: why it is not recorded, in a few words; None if it is, or may be yet.
    """

    def __init__(self, work: Callable[..., Tensor], network: nn.Module, undo: Callable[[], object]) -> None:
        self._work, self._network, self._undo = work, network, undo
        self._calls = 0
        self.refusal: str | None = None
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do the work. What is returned is overwritten by the next call."""
        self._calls += 1
        if self._calls == _EAGER:
            return self._observed(inputs)
        if self._calls == _EAGER + 1 and self.refusal is None:
            self._record(inputs)
        if self._graph is None or _looks(inputs) != _looks(self._inputs):
            return self._work(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        assert self._output is not None
        return self._output

    @property
    def is_recorded(self) -> bool:
        """Whether it is played back from now on."""
        return self._graph is not None

    def forget(self) -> None:
        """Record anew: something else lies where the work's tensors were."""
        self._calls, self.refusal = 0, None
        self._graph, self._inputs, self._output = None, [], None

    def _observed(self, inputs: Sequence[Tensor]) -> Tensor:
        """Do the work, and see whether it can be recorded.

        A recording that waits for the device fails, too, but then torch up to 2.11 can draw no more on it.
        """
        attributes, buffers = _attributes(self._network), dict(self._network.named_buffers())
        drawn, mode = host_randomness(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._work(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = False
        for warning in told:
            if _WAITS in (text := str(warning.message)):
                waits = True
            elif _NOTICE not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if waits:
            self.refusal = "it waits for the device"
        elif host_randomness() != drawn:
            self.refusal = "it draws random numbers on the host"
        elif _attributes(self._network) != attributes or any(
            buffers.get(name) is not buffer for name, buffer in self._network.named_buffers()
        ):
            self.refusal = "a module of the network changes on the host"
        return output

    def _record(self, inputs: Sequence[Tensor]) -> None:
        """Record the work without running it, or refuse it."""
        own, graph = [torch.empty_like(given) for given in inputs], torch.cuda.CUDAGraph()
        try:
            # other threads may read images meanwhile, into memory that CUDA shall pin
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                output = self._work(*own)
        except Exception as error:  # whatever it is: what ran before runs on, or tells what is wrong
            self.refusal = first_line(error)
            self._undo()
        else:
            self._graph, self._inputs, self._output = graph, own, output


def _looks(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _attributes(network: nn.Module) -> dict[tuple[str, str], tuple[type, object]]:
    """Return the numbers and words that modules have as attributes, by the modules' names."""
    return {
        (name, key): (type(value), value)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    }
