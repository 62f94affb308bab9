"""A step's work on a CUDA device, recorded once and played back: the host issues one graph, not a thousand kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kronsearch.training.randomness import host_randomness

__all__ = ["Replay"]

_EAGER = 3  # calls before one is recorded: what is made at the first ones, such as the optimizer's state, is there then


class Replay:
    """Work whose result depends on its inputs and on what lies in memory, and that does the same at every call.

    It runs as it is for a few calls, and is then recorded as a CUDA graph. A step of a small network is a thousand
    kernels of a few microseconds, and to issue them from Python takes longer than to run them. What depends on anything
    else is refused where that can be seen, and goes on running as it is: what waits for the device, what needs more
    memory than there is, and what draws random numbers on the host. Inputs of other shapes run as they are, too.

    It must be called with the same stream current each time, which isn't the device's default one.

    Args:
        work: takes tensors and returns one.
        undo: undoes what work that was recorded, but not run, has left behind on the host.
    """

    def __init__(self, work: Callable[..., Tensor], undo: Callable[[], object]) -> None:
        self._work, self._undo = work, undo
        self._calls = 0
        self._refused = False
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do the work. What is returned is overwritten by the next call."""
        self._calls += 1
        if self._graph is None and not self._refused and self._calls > _EAGER:
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
        self._calls, self._refused = 0, False
        self._graph, self._inputs, self._output = None, [], None

    def _record(self, inputs: Sequence[Tensor]) -> None:
        """Record the work without running it, or refuse it."""
        own, graph, before = [torch.empty_like(given) for given in inputs], torch.cuda.CUDAGraph(), host_randomness()
        try:
            # other threads may read images meanwhile, into memory that CUDA shall pin
            recording = torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
            with recording:
                output = self._work(*own)
        except Exception:  # whatever it is: the calls before went well, and the one that follows tells if it does not
            self._refused = True
        else:
            self._refused = host_randomness() != before
        if self._refused:
            self._undo()
        else:
            self._graph, self._inputs, self._output = graph, own, output


def _looks(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
