"""Factorised layers in the place of a network's dense ones."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from kronsearch.errors import PlanError
from kronsearch.sekron.convolution import conv_like
from kronsearch.sekron.layers import Conv, SeKronLayer, SeKronLinear
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.copies import copied

__all__ = ["empty_layer", "factorise", "replace_layers"]


def factorise(layer: nn.Module, spec: SeKronSpec, metric: Metric | None = None) -> SeKronLayer:
    """Return the factorised layer of a dense one.

    Raises:
        PlanError: the layer is neither a convolution nor a `Linear`.
    """
    if isinstance(layer, Conv):
        return conv_like(layer).from_conv(layer, spec, metric=metric)
    if isinstance(layer, nn.Linear):
        return SeKronLinear.from_linear(layer, spec, metric=metric)
    raise PlanError(f"a {type(layer).__name__} can't be factorised, only Conv1d, Conv2d, Conv3d and Linear can")


def empty_layer(layer: nn.Module, spec: SeKronSpec) -> SeKronLayer:
    """Return the factorised layer of a dense one with factors of zeros."""
    if isinstance(layer, Conv):
        return conv_like(layer).empty(layer, spec)
    assert isinstance(layer, nn.Linear)
    return SeKronLinear.empty(layer, spec)


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module], shared: Iterable[Tensor] = ()) -> nn.Module:
    """Return a copy of a network that has these layers, taken as they are, wherever it holds its own.

    Args:
        model: the network, left as it is.
        layers: by the dotted names of those whose place they take.
        shared: tensors of the network that the copy holds, too.
    """
    replaced = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    small = copied(model, {id(tensor): tensor for tensor in shared} | replaced)
    for module in small.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            _run_plainly(module)
    return small


def _run_plainly(module: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """Let torch not take its fused kernel for a transformer whose weights it can't read any more."""
    if not any(isinstance(part, SeKronLayer) for part in module.modules()):
        return
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    else:
        module.activation_relu_or_gelu = 0  # what the kernel knows the activation by; it is run by its name
