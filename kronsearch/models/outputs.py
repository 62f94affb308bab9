"""Whose output a tensor is, while a network runs."""

from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Outputs"]

T = TypeVar("T")


class Outputs(Generic[T]):
    """What layers have put out in a forward pass, each with whatever stands for its layer."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, int, T]] = {}

    def put(self, output: Tensor, layer: T) -> None:
        """Take down what a layer puts out."""
        if not output.is_inference():  # of which no versions are counted
            self._seen[id(output)] = (output, output._version, layer)

    def whose(self, tensor: Tensor) -> T | None:
        """Return whose output it is; None if that of nobody, or if it was changed in place since."""
        output, version, layer = self._seen.get(id(tensor), (None, 0, None))
        return layer if output is not None and output._version == version else None

    def clear(self) -> None:
        """Forget all of them: they are kept in memory till then."""
        self._seen.clear()
