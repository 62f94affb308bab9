"""Factorising layer by layer: each is fitted to what the dense one puts out, given what it gets in the new network.

Layers that are factorised each by itself add up their errors. One that is fitted in the network that those before it
have become makes up for a part of them (asymmetric reconstruction: Zhang, Zou, He and Sun, 2016, section 3.3). For the
compressed network's input patches x and the dense network's outputs t this is a kernel first, the one of least
`E‖t - Wx‖²`, with a ridge towards the trained one; then that kernel's factors, in the norm of those inputs. Layers that
stay dense take the kernel itself, at no cost: the last one makes up for most.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.outputs import Outputs
from kronsearch.models.patches import WIDEST, Patches, groups_of
from kronsearch.sekron.layers import Conv, SeKronLayer
from kronsearch.sekron.metrics import Metric, Moments
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.blocks import input_of
from kronsearch.training.copies import copied
from kronsearch.training.data import Data, train_inputs
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import eval_mode, forward

__all__ = ["factorise_in_order"]

_BATCH = 64
_RIDGE = 0.1  # of the inputs' mean square, towards the trained kernel; with 0.01 and 0.001 ResNet-20 was about the same


@dataclass
class _Survey:
    """What one batch in the dense network showed.

    order: names of convolutions and linear layers in the order of their first calls
    calls: how often each was called
    norms: of a layer that was called once, the batch norm that took its output as it is, and nothing else
    """

    order: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)


@dataclass
class _Sums:
    """Means, covariances of input patches and with outputs, by groups; see `Patches`."""

    layer: Conv | nn.Linear
    read: Callable[..., Iterable[tuple[Tensor, Tensor | None]]]
    count: int = 0

    def __post_init__(self) -> None:
        weight, groups = self.layer.weight, groups_of(self.layer)
        width, out = weight[0].numel(), len(weight) // groups
        like = weight.new_zeros((), dtype=torch.float32)
        self.squares, self.products = like.new_zeros(groups, width, width), like.new_zeros(groups, out, width)
        # summed up without the first ones' mean: what they vary by may be little beside it
        self.origins = [like.new_zeros(groups, 1, width), like.new_zeros(groups, 1, out)]
        self.sums = [torch.zeros_like(origin) for origin in self.origins]

    def see(self, data: Tensor, outputs: Tensor) -> None:
        for patches, beside in self.read(data.float(), outputs.float()):
            assert beside is not None
            rows = [found.movedim(1, 0).flatten(1, 2) for found in (patches, beside)]
            if self.count == 0:
                self.origins = [found.mean(1, keepdim=True) for found in rows]
            inputs, wanted = (found - origin for found, origin in zip(rows, self.origins, strict=True))
            self.squares.baddbmm_(inputs.mT, inputs)
            self.products.baddbmm_(wanted.mT, inputs)
            for total, found in zip(self.sums, (inputs, wanted), strict=True):
                total += found.sum(1, keepdim=True)
            self.count += inputs.shape[1]

    @property
    def told(self) -> bool:
        """Whether there is anything to fit to: it was called, and with numbers."""
        return self.count > 0 and bool(self.squares.isfinite().all()) and bool(self.products.isfinite().all())

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean patch (groups, width) and output (groups, out channels / groups)."""
        inputs, wanted = (
            (origin + total / self.count).squeeze(1) for origin, total in zip(self.origins, self.sums, strict=True)
        )
        return inputs, wanted

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the second moments of patches, and of outputs and patches, centred or not."""
        inputs, wanted = (total / self.count for total in self.sums)
        squares = self.squares / self.count - inputs.mT @ inputs
        products = self.products / self.count - wanted.mT @ inputs
        if not centred:
            own, others = self.means()
            squares, products = squares + own[:, :, None] * own[:, None], products + others[:, :, None] * own[:, None]
        return squares, products


def factorise_in_order(
    dense: nn.Module,
    specs: Mapping[str, SeKronSpec],
    free: Collection[str],
    metrics: Mapping[str, Metric],
    data: Data,
    *,
    images: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    tell: Callable[[int, str], None] = lambda *_: None,
) -> nn.Module:
    """Return a copy of a network with layers replaced, each fitted in the network that those before it have become.

    Batch norms that take a layer's output get its statistics, and the affine part that makes of them the dense
    network's function, so that a training begins with the network that was fitted: re-estimated, they would lose much
    of it. Kernels of more than 8192 entries an output are factorised by themselves. Every layer takes half a pass of
    either network over the images.

    Args:
        dense: the network, on `device`; left untouched.
        specs: of the layers to replace.
        free: names of layers whose weights may change, though they stay dense.
        metrics: of layers, in the dense network; what their outputs matter is taken from there.
        data: whose training split is read.
        images: about how many, augmented as for training.
        generator: chooses them.
        device: to run on.
        tell: is called with the number of layers that are replaced, and the name of the next that is fitted.
    """
    batches = list(train_inputs(data, min(_BATCH, images), images, generator=generator, device=device))
    seen = _survey(dense, batches[0])
    wanted = [name for name in seen.order if name in specs or name in free]
    wanted = [name for name in wanted if dense.get_parameter(f"{name}.weight")[0].numel() <= WIDEST]
    alone = {n: factorise(dense.get_submodule(n), s, metrics.get(n)) for n, s in specs.items() if n not in wanted}
    small = replace_layers(dense, alone)
    done = len(alone)
    for name in wanted:
        tell(done, name)
        sums = _gather(dense, small, name, seen.calls[name], batches)
        layer, metric, norm = small.get_submodule(name), metrics.get(name), seen.norms.get(name)
        if sums.told:
            outputs = None if metric is None else metric.moments.outputs
            layer, metric = _fitted(layer, sums, outputs, normed=norm is not None)
        if name in specs:
            layer, done = factorise(layer, specs[name], metric), done + 1
        small = replace_layers(small, {name: layer})
        if norm is not None and sums.told:
            _set_norm(small.get_submodule(norm), layer, sums)
    return small


def _survey(dense: nn.Module, batch: Tensor) -> _Survey:
    seen = _Survey()
    produced: Outputs[str] = Outputs()
    norms: dict[str, list[str | None]] = {}  # whose outputs each batch norm was called with

    def on_layer(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if name not in seen.calls:
                seen.order.append(name)
            seen.calls[name] = seen.calls.get(name, 0) + 1
            produced.put(output, name)

        return hook

    def on_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            norms.setdefault(name, []).append(produced.whose(input_of(inputs, named)))

        return hook

    hooks: list[Callable[[], RemovableHandle]] = []
    for name, module in dense.named_modules():
        if isinstance(module, Conv | nn.Linear):
            hooks.append(partial(module.register_forward_hook, on_layer(name)))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(partial(module.register_forward_pre_hook, on_norm(name), with_kwargs=True))
    _run(dense, batch, *hooks)
    for norm, layers in norms.items():
        if len(layers) == 1 and layers[0] is not None and seen.calls[layers[0]] == 1:
            seen.norms[layers[0]] = norm
    return seen


def _gather(dense: nn.Module, small: nn.Module, name: str, calls: int, batches: Sequence[Tensor]) -> _Sums:
    """Return the sums of a layer over what it gets in one network and puts out in the other."""
    layer = dense.get_submodule(name)
    assert isinstance(layer, Conv | nn.Linear)
    sums = _Sums(layer, Patches(name, layer, sum(map(len, batches))).read)
    wanted: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        wanted.append(output.clone())  # which may be changed in place behind it
        if len(wanted) == calls:
            raise _Enough

    def read(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if wanted:
            sums.see(input_of(inputs, named), wanted.pop(0))
        if not wanted:
            raise _Enough

    for batch in batches:
        wanted.clear()
        _run(dense, batch, lambda: layer.register_forward_hook(keep))
        _run(small, batch, lambda: small.get_submodule(name).register_forward_pre_hook(read, with_kwargs=True))
    return sums


class _Enough(Exception):  # noqa: N818 -- it is no error
    """The layer that is looked at was called: what comes behind it is of no use."""


def _run(network: nn.Module, batch: Tensor, *hooks: Callable[[], RemovableHandle]) -> None:
    """Run a network in eval mode on a batch, with these hooks, until one of them has seen enough."""
    with ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        stack.enter_context(freed_memory_kept(batch.device))
        stack.enter_context(eval_mode(network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_Enough))
        forward(network, batch.clone(), "float32")  # which the network may change in place


def _fitted(layer: nn.Module, sums: _Sums, outputs: Tensor | None, *, normed: bool) -> tuple[nn.Module, Metric]:
    """Return the dense layer that comes nearest to what is wanted, and the metric in which it is to be factorised."""
    layer = copied(layer)
    assert isinstance(layer, Conv | nn.Linear)
    biased = layer.bias is not None and not normed  # else a norm takes the mean up
    squares, products = sums.moments(centred=normed or biased)
    means, others = sums.means()
    kernel = _best_kernel(layer.weight.detach(), squares, products)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if layer.bias is not None and biased:
            layer.bias.copy_((others.double() - _on(kernel, means)).flatten())
    return layer, Metric(Moments(squares.mean(0), outputs, means if biased else None))


def _best_kernel(weight: Tensor, squares: Tensor, products: Tensor) -> Tensor:
    """Return the kernel of least squares, with a ridge towards the trained one, as its double."""
    trained = weight.double().reshape(len(squares), -1, squares.shape[-1])
    ridge = _RIDGE * squares.double().diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(squares.shape[-1], dtype=torch.float64, device=squares.device)
    if not bool((ridge > 0).all()):  # a group that nothing enters
        return weight.double()
    solved = torch.linalg.solve(squares.double() + ridge * eye, (products.double() + ridge * trained).mT).mT
    return solved.reshape(weight.shape) if bool(solved.isfinite().all()) else weight.double()


def _on(kernel: Tensor, patches: Tensor) -> Tensor:
    """Apply a kernel to patches (groups, width), one for each group; returns (groups, out channels / groups)."""
    rows = kernel.double().reshape(len(patches), -1, patches.shape[-1])
    return (rows @ patches.double()[:, :, None]).squeeze(2)


def _set_norm(norm: nn.Module, layer: nn.Module, sums: _Sums) -> None:
    """Give a batch norm the statistics of the layer before it, and the dense network's function of what is wanted."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    kernel = layer.kernel if isinstance(layer, SeKronLayer) else layer.weight
    assert isinstance(kernel, Tensor)
    (squares, _), (patches, wanted) = sums.moments(centred=True), sums.means()
    with torch.no_grad():
        rows = kernel.double().reshape(len(squares), -1, squares.shape[-1])
        own = _on(kernel, patches).flatten()
        if layer.bias is not None:
            own = own + layer.bias.double()  # type: ignore[operator]
        spread = ((rows @ squares.double()) * rows).sum(2).flatten().clamp_min(0)
        if norm.weight is None:  # nothing takes a change of scale up
            mean.copy_(mean.double() + own - wanted.double().flatten())
            return
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.bias.double() + scale * (wanted.double().flatten() - mean.double()))
        norm.weight.copy_(scale * (spread + norm.eps).sqrt())
        mean.copy_(own)
        variance.copy_(spread)
