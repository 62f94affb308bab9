"""Copies of networks, as all that is done to a network is done to one."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kronsearch.errors import ModelError, check_kind, first_line

__all__ = ["check_network", "copied"]


def check_network(network: object) -> None:
    """Raise ModelError unless it is a network."""
    check_kind("a network is a torch.nn.Module, such as load_model returns", network, nn.Module, ModelError)


def copied(network: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a network.

    Tensors that modules keep as attributes, and that were computed from others, such as what a forward pass left there
    for others to look at, are copied by their values; torch refuses to copy them otherwise.

    Args:
        network: left as it is.
        instead: what the copy holds in the place of objects, by their `id`; at all places alike, and as it is.

    Raises:
        ModelError: the network holds something that can't be copied.
    """
    computed = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(network, {**computed, **(instead or {})})
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"{type(network).__name__} can't be copied ({reason}): what is compressed is a copy, so take from the "
            "network what is in the way"
        ) from error
