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
_WAITS = "called a synchronizing CUDA operation"  # torch's words
_HELD = (bool, int, float, str, Tensor)


class Replay:
    """Work whose result depends on its inputs and on what lies in memory, and that does the same at every call.

    It runs as it is for a few calls, and is then recorded as a CUDA graph. A step of a small network is a thousand
    kernels of a few microseconds, and to issue them from Python takes longer than to run them. The last of those calls
    shows what can't be played back, and goes on running as it is: what waits for the device, draws random numbers on
    the host, or counts or puts another tensor in a buffer's place on the host. What needs more memory than there is
    runs as it is, too, and inputs of other shapes. What only a later call does on the host is not seen.

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
        held, drawn, mode = _held(self._network), host_randomness(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._work(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any(_WAITS in str(warning.message) for warning in told):
            self.refusal = "it waits for the device"
        elif host_randomness() != drawn:
            self.refusal = "it draws random numbers on the host"
        elif not _same(held, _held(self._network)):
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


def _held(network: nn.Module) -> dict[tuple[str, str], object]:
    """Return the numbers, words and tensors that modules have as attributes and buffers, by the module's name."""
    return {
        (name, key): value
        for name, module in network.named_modules()
        for key, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items()
        if isinstance(value, _HELD)
    }


def _same(one: dict[tuple[str, str], object], other: dict[tuple[str, str], object]) -> bool:
    """Tell whether numbers and words are equal, and tensors the very same ones."""
    return one.keys() == other.keys() and all(
        other[key] is value or (not isinstance(value, Tensor) and other[key] == value) for key, value in one.items()
    )
