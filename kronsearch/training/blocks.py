"""The outputs of a network's blocks, and how far a student's are from its teacher's."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Recorder", "block_names", "feature_distance"]


def block_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that hold these layers, by dotted name, without the whole network."""
    return tuple(sorted({name.rpartition(".")[0] for name in layers} - {""}))


class Recorder:
    """Records what the named modules of a network return, those that return one floating tensor; the last call counts.

    Its hooks stay until it is closed: a compiled network keeps those that it was compiled with. Raises AttributeError
    if the model has no such module.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._seen: dict[str, Tensor] = {}
        modules = {name: model.get_submodule(name) for name in names}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        seen = self._seen

        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[name] = output

        return hook

    def take(self) -> dict[str, Tensor]:
        """Return what was recorded since the last time, by the modules' names, and forget it."""
        taken = dict(self._seen)
        self._seen.clear()
        return taken

    def close(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


def feature_distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return `‖s - t‖² / ‖t‖²`, its mean over the blocks that both have in one shape, a scalar; 0 without any.

    Differentiable once, in the student's outputs.
    """
    distances = []
    for name, wanted in teacher.items():
        found = student.get(name)
        if found is not None and found.shape == wanted.shape:
            power = _energy(wanted).clamp_min(torch.finfo(torch.float32).tiny)
            distances.append(_Apart.apply(found, wanted) / power)
    return torch.stack(distances).mean() if distances else torch.zeros(())


class _Apart(torch.autograd.Function):
    """`‖s - t‖²` of outputs in the precision of autocast, without copies of them in float32.

    Moving the outputs of blocks through memory is what it costs: there and back it takes a sixth of the time of
    squares and their mean, which were a fifth of the training step of ResNet-20 (one thread, bf16).
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        apart = found - wanted
        ctx.save_for_backward(apart)
        return _energy(apart)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [apart] = ctx.saved_tensors
        return apart * (2 * gradient).to(apart.dtype), None


def _energy(outputs: Tensor) -> Tensor:
    """Return the sum of squares in float32 or better, a scalar; of bf16, each example's norm is rounded to that."""
    norms = torch.linalg.vector_norm(outputs, dim=tuple(range(1, outputs.dim())) or None)
    total: Tensor = norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()
    return total
