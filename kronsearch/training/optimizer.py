"""AdamW for factorised networks, and its state as tensors by name."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kronsearch.sekron.layers import SeKronLayer

__all__ = ["make_optimizer", "moments", "restore_moments"]


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter, 2019) over the trainable parameters of a model.

    Tensors of two or more dimensions decay. A kernel of S factors decays by the product of what its factors do, so each
    of them has an S-th of the decay: else the more factors a kernel has, the faster it would shrink.
    """
    shares = {
        id(factor): layer.spec.sequence_length
        for layer in model.modules()
        if isinstance(layer, SeKronLayer)
        for factor in layer.factors
    }
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() >= 2 or id(parameter) in shares else 0.0
            groups[decay / shares.get(id(parameter), 1)].append(parameter)
    # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        lr=lr,
        fused=device.type in ("cpu", "cuda"),
    )


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state by the names of the model's parameters: `NAME/exp_avg` and the like."""
    return {
        f"{name}/{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Undo `moments`. Raises KeyError or ValueError where the tensors are not of this model."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in state.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        if kind not in ("exp_avg", "exp_avg_sq", "step") or tensor.shape not in (parameter.shape, torch.Size()):
            raise ValueError(
                f"{key} of shape {tuple(tensor.shape)} is no state of a parameter {tuple(parameter.shape)}"
            )
        # laid out as the parameter is: the fused step walks through both by their places in memory
        own = torch.empty_like(parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)
        optimizer.state[parameter][kind] = own.detach().copy_(tensor)
