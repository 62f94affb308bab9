"""Whether a network's own code takes factorised layers in the place of its dense ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kronsearch.errors import first_line
from kronsearch.models.factorised import empty_layer, replace_layers
from kronsearch.sekron.layers import Conv, SeKronLayer
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["unfit_layers"]


def unfit_layers(model: nn.Module, example: Tensor, names: Sequence[str]) -> dict[str, str]:
    """Return, by the names of layers, why a network can't run on an example with them factorised; of others nothing.

    All are replaced at once, by layers of one factor that is their kernel; each by itself only where that fails: where
    code asks for what a factorised layer doesn't have, such as an attribute that was put on it, or calls layers of
    torch's classes only.
    """
    if not names or (together := _failure(model, example, names)) is None:
        return {}
    alone = {name: failure for name in names if (failure := _failure(model, example, [name])) is not None}
    return alone or dict.fromkeys(names, together)


def _failure(model: nn.Module, example: Tensor, names: Sequence[str]) -> str | None:
    layers = {name: _of_one_factor(model.get_submodule(name)) for name in names}
    # nothing is trained here, and parameters can be many
    network, called = replace_layers(model, layers, shared=model.parameters()), set[nn.Module]()
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda module, _: called.add(module))
    try:
        with torch.no_grad():
            network(example)
    except Exception as error:
        return f"the network can't run with it factorised ({type(error).__name__}: {first_line(error)})"
    return None if called == {*layers.values()} else "the network doesn't call it once it is factorised"


def _of_one_factor(layer: nn.Module) -> SeKronLayer:
    assert isinstance(layer, Conv | nn.Linear)
    made = empty_layer(layer, SeKronSpec((tuple(layer.weight.shape),)))
    made.factors[0] = layer.weight
    made.register_parameter("bias", layer._parameters["bias"])
    return made.eval()
