"""The outputs of a network's blocks, and how far a student's are from its teacher's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Watched", "block_names", "feature_distance", "input_of"]

_FAINT = 1e-6  # of the mean square of what blocks put out


def block_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that hold these layers, by dotted name, without the whole network."""
    return tuple(sorted({name.rpartition(".")[0] for name in layers} - {""}))


def input_of(inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """Return what a layer of torch was called with, as its hooks are told it: by place, or as `input`."""
    return inputs[0] if inputs else named["input"]


class Watched(nn.Module):
    """A network that returns, with its outputs, those of some of its modules by their names.

    Of these, those that return one floating tensor; of several calls the last one counts. The hooks that this takes
    stay until it is closed. That names are read in `forward` lets compiled code be reused for the same ones only: hooks
    alone would not.

    Args:
        network: to run.
        names: dotted names of modules of the model.
        model: whose modules they are; None is the network itself.

    Raises:
        AttributeError: the model has no such module.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], model: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)
        self._seen: dict[str, Tensor] = {}
        modules = [(network if model is None else model).get_submodule(name) for name in self.names]
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in zip(self.names, modules, strict=True)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        seen = self._seen

        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[name] = output

        return hook

    def forward(self, inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Return the network's outputs, and those of the modules."""
        outputs = self.network(inputs)
        found = {name: self._seen[name] for name in self.names if name in self._seen}
        self._seen.clear()
        return outputs, found

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()


def feature_distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return `‖s - t‖² / ‖t‖²`, its mean over the blocks that both have in one shape, a scalar; 0 without any.

    Differentiable once, in the student's outputs. Where the teacher puts out next to nothing, as a residual branch does
    whose last batch norm has a scale of zero, `‖t‖²` is taken to be a millionth of what blocks of that size have.
    """
    pairs = [
        (found, wanted)
        for name, wanted in teacher.items()
        if (found := student.get(name)) is not None and found.shape == wanted.shape and wanted.numel() > 0
    ]
    if not pairs:
        return torch.zeros(())
    apart = torch.stack([_Apart.apply(found, wanted) / wanted.numel() for found, wanted in pairs])
    powers = torch.stack([_energy(wanted) / wanted.numel() for _, wanted in pairs])
    return (apart / powers.clamp_min(_FAINT * powers.mean()).clamp_min(torch.finfo(torch.float32).tiny)).mean()


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
