"""Calibration: the second moments of what enters each layer and of the gradients that come back to it."""

import math
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.sekron.layers import conv_geometry
from kronsearch.sekron.metrics import Moments
from kronsearch.training.data import Data, endless_train_batches
from kronsearch.training.precision import eval_mode, forward

__all__ = ["gather_moments"]

_BATCH = 64
_MOST_PATCHES = 100_000  # of each layer; beyond, a coarser grid of positions is read
_WIDEST = 8192  # entries of an input patch
_CHUNK = 2**24  # entries of unfolded patches in memory at a time


class _Layer:
    """The sums for one layer."""

    def __init__(self, name: str, layer: nn.Conv2d | nn.Linear, images: int) -> None:
        self.layer, self.images = layer, images
        # of its own: which other layers are looked at changes nothing for this one
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        width = layer.weight[0].numel()
        self.inputs = torch.zeros(width, width, device=layer.weight.device)
        self.mean = torch.zeros(width, device=layer.weight.device)
        self.outputs = torch.zeros(len(layer.weight), len(layer.weight), device=layer.weight.device)
        self.patches = 0
        self.before_norm = False

    def see_inputs(self, data: Tensor) -> None:
        for patches in self._patches(data.detach().float()):
            self.inputs.addmm_(patches.T, patches)
            self.mean += patches.sum(0)
            self.patches += len(patches)

    def see_gradients(self, gradient: Tensor) -> None:
        rows = gradient.detach().float()
        rows = (
            rows.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(self.layer, nn.Conv2d) else rows.flatten(0, -2)
        )
        self.outputs.addmm_(rows.T, rows)

    def _patches(self, data: Tensor) -> Iterable[Tensor]:
        """Yield the inputs of every output, or of a grid of them, as rows (patches, C·prod(extent))."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            rows = data.flatten(0, -2)
            step = math.ceil(len(rows) / len(data) * self.images / _MOST_PATCHES)
            yield rows[self._offset(step, len(rows)) :: step]
            return
        geometry = conv_geometry(layer)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        data = F.pad(data, [n for pair in reversed(geometry.padding) for n in pair], mode=mode)
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        high, wide = ((n - span - 1) // s + 1 for n, span, s in zip(data.shape[2:], spans, layer.stride, strict=True))
        step = math.ceil(math.sqrt(high * wide * self.images / _MOST_PATCHES))
        top, left = self._offset(step, high) * layer.stride[0], self._offset(step, wide) * layer.stride[1]
        data = data[:, :, top:, left:]
        stride = (layer.stride[0] * step, layer.stride[1] * step)
        examples = max(1, _CHUNK // (layer.weight[0].numel() * math.ceil(high / step) * math.ceil(wide / step)))
        for chunk in torch.split(data, examples):
            patches = F.unfold(chunk, layer.kernel_size, dilation=layer.dilation, stride=stride)
            yield patches.transpose(1, 2).flatten(0, 1)

    def _offset(self, step: int, count: int) -> int:
        return int(torch.randint(min(step, count), (), generator=self.generator))

    def moments(self, images: int) -> Moments:
        mean = self.mean / self.patches
        inputs = self.inputs / self.patches
        has_bias = self.layer.bias is not None
        if self.before_norm or has_bias:
            inputs = inputs - torch.outer(mean, mean)
        return Moments(inputs, self.outputs / images, mean if has_bias and not self.before_norm else None)


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

    Args:
        model: the dense network, on `device`; run in eval mode, and left as it was.
        data: whose training split is read.
        names: dotted names of `Conv2d` (ungrouped) and `Linear` layers; those with over 8192 entries in an input patch
            are left out, whose moments would fill the memory.
        images: about how many to read, in whole batches.
        generator: chooses images, augmentation and directions; the same whichever layers are named.
        device: to run on.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sums = {
        name: _Layer(name, layer, images)
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight[0].numel() <= _WIDEST
    }
    produced: dict[int, tuple[Tensor, int, _Layer]] = {}

    def on_forward(seen: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.see_inputs(inputs[0])
            produced[id(output)] = (output, output._version, seen)
            if output.requires_grad:
                output.register_hook(seen.see_gradients)  # type: ignore[no-untyped-call]

        return hook

    def on_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        output, version, seen = produced.get(id(inputs[0]), (None, 0, None))
        if output is not None and seen is not None and output._version == version:  # no activation in place between
            seen.before_norm = True

    done = 0
    with ExitStack() as stack:
        for name, seen in sums.items():
            stack.callback(layers[name].register_forward_hook(on_forward(seen)).remove)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.callback(module.register_forward_pre_hook(on_norm).remove)
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.enable_grad())
        batches = endless_train_batches(data, min(_BATCH, images), generator=generator, device=device)
        while done < images:
            # the inputs ask for gradients so that every layer's output does, frozen weights or not
            inputs = next(batches)[0].detach().requires_grad_()
            outputs = forward(model, inputs, "float32")
            direction = torch.randn(outputs.shape, generator=generator).to(outputs)
            torch.autograd.grad(outputs, inputs, direction)
            produced.clear()
            done += len(inputs)
        batches.close()
    return {name: seen.moments(done) for name, seen in sums.items()}
