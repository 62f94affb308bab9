"""The outputs of a network's blocks, and how far a student's are from its teacher's."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["block_names", "feature_distance", "recorded_outputs"]


def block_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that hold these layers, by dotted name, without the whole network."""
    return tuple(sorted({name.rpartition(".")[0] for name in layers} - {""}))


@contextmanager
def recorded_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record what the named modules return while inside, those that return one floating tensor; the last call counts.

    Raises AttributeError if the model has no such module.
    """
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def feature_distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return `‖s - t‖² / ‖t‖²`, its mean over the blocks that both have in one shape, a scalar; 0 without any."""
    distances = []
    for name, wanted in teacher.items():
        found = student.get(name)
        if found is not None and found.shape == wanted.shape:
            power = wanted.square().mean(dtype=torch.float32)
            apart = (found - wanted).square().mean(dtype=torch.float32)
            distances.append(apart / power.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(distances).mean() if distances else torch.zeros(())
