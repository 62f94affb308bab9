"""Calibration: the second moments of what enters each layer and of the gradients that come back to it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kronsearch.errors import ModelError
from kronsearch.models.outputs import Outputs
from kronsearch.models.patches import WIDEST, Patches, batched, groups_of
from kronsearch.sekron.layers import Conv
from kronsearch.sekron.metrics import Moments
from kronsearch.training.blocks import input_of
from kronsearch.training.data import Data, train_inputs
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import eval_mode, forward

__all__ = ["gather_moments"]

_BATCH = 64


class _Layer:
    """The sums for one layer."""

    def __init__(self, name: str, layer: Conv | nn.Linear, images: int) -> None:
        self.layer, self.groups = layer, groups_of(layer)
        self._read = Patches(name, layer, images).read
        width = layer.weight[0].numel()
        like = layer.weight.new_zeros((), dtype=torch.float32)
        self.inputs = like.new_zeros(width, width)
        # patches are summed up without the first ones' mean: what they vary by may be little beside it
        self.origin = like.new_zeros(self.groups, width)
        self.mean = torch.zeros_like(self.origin)
        self.outputs = like.new_zeros(len(layer.weight), len(layer.weight))
        self.patches = 0  # of each group
        self.before_norm = self.derived = False

    def see_inputs(self, data: Tensor) -> None:
        for found, _ in self._read(data.detach().float()):
            if self.patches == 0:
                self.origin = found.mean((0, 2))
            patches = found - self.origin[:, None]
            rows = patches.flatten(0, -2)
            self.inputs.addmm_(rows.T, rows)
            self.mean += patches.sum((0, 2))
            self.patches += len(rows) // self.groups

    def see_gradients(self, gradient: Tensor) -> None:
        self.derived = True
        rows = gradient.detach().float()
        if isinstance(self.layer, nn.Linear):
            rows = rows.reshape(-1, rows.shape[-1])
        else:
            rows = batched(self.layer, rows).flatten(2).mT.flatten(0, 1)
        self.outputs.addmm_(rows.T, rows)

    def moments(self, images: int) -> Moments:
        groups = self.groups
        moved = self.mean / self.patches
        mean = self.origin + moved
        inputs = self.inputs / (self.patches * groups) - moved.T @ moved / groups
        has_bias = self.layer.bias is not None
        if not (self.before_norm or has_bias):
            inputs = inputs + mean.T @ mean / groups
        outputs = self.outputs / images if self.derived else None
        if outputs is not None and groups > 1:
            # an output meets no other group's inputs, so the two can't make up for each other
            own = torch.eye(groups, device=outputs.device)[:, None, :, None]
            outputs = (outputs.reshape(groups, -1, groups, len(outputs) // groups) * own).reshape(outputs.shape)
        return Moments(inputs, outputs, mean if has_bias and not self.before_norm else None)


def gather_moments(
    model: nn.Module,
    data: Data,
    names: Iterable[str],
    *,
    images: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> dict[str, Moments]:
    """Return the second moments of layers on training images, augmented as for training.

    The inputs' moments are means over patches; the gradients' are sums over the positions of an example, so that
    `tr(G ΔW Ω ΔWᵀ)` estimates the mean squared change of the network's outputs when a kernel changes (K-FAC: Martens
    and Grosse, 2015). What is derived are the outputs in random directions, which makes `G` the Gauss-Newton matrix of
    the outputs' squared error: it needs no labels and no task, and on networks that have memorised their training
    images it was far better than the label loss, whose gradients come from a few of them.
    The inputs' moments are centred where a batch norm or the layer's own bias takes up a change of the mean output.
    A grouped convolution has one kernel's moment, the mean over its groups, each of them centred by itself. There are
    no gradients' moments of a layer whose output the network's doesn't depend on by a gradient, such as one that runs
    under `torch.no_grad`.

    Args:
        model: the dense network, on `device`; run in eval mode, and left as it was.
        data: whose training split is read.
        names: dotted names of convolutions and linear layers; those with over 8192 entries in an input patch
            are left out, whose moments would fill the memory.
        images: about how many to read, in whole batches.
        generator: chooses images, augmentation and directions; the same whichever layers are named.
        device: to run on.

    Raises:
        ModelError: the moments of a layer are not finite, or the network's outputs have no gradient at all.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sums = {
        name: _Layer(name, layer, images)
        for name, layer in layers.items()
        if isinstance(layer, Conv | nn.Linear) and layer.weight[0].numel() <= WIDEST
    }
    produced: Outputs[_Layer] = Outputs()
    roots: list[Tensor] = []  # where gradients go back to

    def rooted(value: Any) -> Any:
        """Return an input that gradients go back to, whatever stands before it: tokens, or layers without gradients."""
        if not (isinstance(value, Tensor) and value.is_floating_point() and torch.is_grad_enabled()):
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
            roots.append(value)
        return value

    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(rooted, inputs)), {name: rooted(value) for name, value in named.items()}

    def on_forward(seen: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            seen.see_inputs(input_of(inputs, named))
            produced.put(output, seen)
            if output.requires_grad:
                output.register_hook(seen.see_gradients)  # type: ignore[no-untyped-call]

        return hook

    def on_norm(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if (seen := produced.whose(input_of(inputs, named))) is not None:  # no activation in place between
            seen.before_norm = True

    done = 0
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:  # so that gradients go to the roots alone
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        for name, seen in sums.items():
            stack.callback(layers[name].register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layers[name].register_forward_hook(on_forward(seen), with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.callback(module.register_forward_pre_hook(on_norm, with_kwargs=True).remove)
        stack.enter_context(freed_memory_kept(device))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.enable_grad())
        for batch in train_inputs(data, min(_BATCH, images), images, generator=generator, device=device):
            outputs = forward(model, rooted(batch).clone(), "float32")  # which the network may change in place
            direction = torch.randn(outputs.shape, generator=generator).to(outputs)
            if not outputs.requires_grad:
                raise ModelError(
                    f"the outputs of {type(model).__name__} have no gradient by those of its layers, so it can't be "
                    "trained: pass one that doesn't run under torch.no_grad, and returns no choices such as argmax"
                )
            torch.autograd.grad(outputs, roots, direction, allow_unused=True)
            produced.clear()
            roots.clear()
            done += len(batch)
    moments = {name: seen.moments(done) for name, seen in sums.items()}
    for name, found in moments.items():
        for tensor, what in ((found.inputs, "what enters"), (found.outputs, "the gradients that come back to")):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{what} {name} on training images can't be held in float32, or has entries that are not numbers: "
                    "pass a trained checkpoint, and the data that it was trained on"
                )
    return moments
