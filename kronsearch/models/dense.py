"""Which layers must be kept dense, and why: rules on a module, and a watched forward pass of the whole network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from kronsearch.errors import ModelError
from kronsearch.training.copies import copied

__all__ = ["KERNEL_OWNERS", "Watched", "dense_reasons", "watch_forward"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_REPLACEABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_LIKE_TORCHS = {"timm.layers.linear.Linear"}  # differs from torch's under TorchScript only
KERNEL_OWNERS = (*_CONVOLUTIONS, nn.Linear)  # the classes whose `weight` is a kernel


@dataclass
class Watched:
    """What one forward pass showed, by the dotted name of a module.

    order: names in the order of their first call
    calls: for a convolution its spatial input size, once for each image of the call; for a linear layer (rows,)
    readers: for the weight of a convolution or linear layer, the modules other than itself that used it
    """

    order: list[str] = field(default_factory=list)
    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)


class _WeightReads(TorchFunctionMode):
    """Notes each torch function, attribute reads included, that gets a layer's weight outside of that layer's call."""

    def __init__(self, owners: Mapping[int, str], running: list[str], readers: dict[str, list[str]]) -> None:
        super().__init__()
        self.owners, self.running, self.readers = owners, running, readers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                owner = self.owners.get(id(item))
                if owner is not None and owner != self.running[-1]:
                    names = self.readers.setdefault(owner, [])
                    if self.running[-1] not in names:
                        names.append(self.running[-1])
        return func(*args, **kwargs)


def watch_forward(model: nn.Module, example: Tensor) -> Watched:
    """Run a copy of `model` on `example`, a batch of one, and report what was called with which sizes.

    What has its layers replaced is a copy, too. So ModelError is raised where the model can't be copied, or where the
    copy calls a module of the original, which a function made in `__init__` may keep: it would do so for ever.
    Modes and hooks are the caller's care: this adds hooks to every module and removes them, also when the pass fails.
    """
    seen = Watched()
    running = [""]
    owners: dict[int, str] = {}
    handles = []
    tensors = chain(model.parameters(), model.buffers())
    twin = copied(model, {id(tensor): tensor for tensor in tensors})

    def watch(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(name)
            if name not in seen.calls:
                seen.order.append(name)
            value = args[0] if args else kwargs.get("input")
            seen.calls.setdefault(name, []).extend(_sizes(module, value))

        def leave(*_: Any) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    def forbid(name: str, module: nn.Module) -> None:
        def refuse(*_: Any) -> None:
            raise ModelError(
                f"{type(model).__name__} calls {name or 'itself'} by a reference that a copy of it keeps, such as a "
                "function made in __init__: call it in forward as an attribute of self"
            )

        handles.append(module.register_forward_pre_hook(refuse, prepend=True))

    try:
        for name, module in model.named_modules():
            forbid(name, module)
        for name, module in twin.named_modules():
            watch(name, module)
            weight = module._parameters.get("weight")
            if isinstance(module, KERNEL_OWNERS) and weight is not None:
                owners[id(weight)] = name
        with torch.no_grad(), _WeightReads(owners, running, seen.readers):
            twin(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _sizes(module: nn.Module, value: Any) -> list[tuple[int, ...]]:
    if not isinstance(value, Tensor):
        return []
    if isinstance(module, _CONVOLUTIONS):
        axes = len(module.kernel_size)
        images = value.shape[0] if value.dim() == axes + 2 else 1
        return [tuple(value.shape[-axes:])] * images
    return [(prod(value.shape[:-1]),)] if isinstance(module, nn.Linear) else []


def dense_reasons(model: nn.Module, watched: Watched) -> dict[str, str | None]:
    """Return by name why each module can't be replaced, None for a plain convolution or linear layer that can.

    A module registered under several names stands under its first. `watched` is the report of `watch_forward`.
    """
    users: dict[tuple[int, int], list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and not is_lazy(parameter):
                users.setdefault(_place(parameter), []).append(name)
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        reason = _kind_reason(module)
        if reason is None:
            reason = _use_reason(name, watched)
            for kind, parameter in module.named_parameters(recurse=False):
                if sharers := [_or_model([user]) for user in users[_place(parameter)] if user != name]:
                    reason = f"{kind} is shared with {', '.join(sharers)}"
            if name == "":
                reason = "the model itself: nothing holds it that a factorised layer could be put into"
        reasons[name] = reason
    return reasons


def _place(weight: Tensor) -> tuple[int, int]:
    return weight.untyped_storage().data_ptr(), int(weight.storage_offset())


def _kind_reason(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, _TRANSPOSED):
        return "transposed convolution"
    if is_parametrized(module):
        return "parametrized weight"
    base = next((base for base in _REPLACEABLE if isinstance(module, base)), None)
    if base is None:
        return f"{kind} is neither a convolution nor Linear"
    if _has_code_of_its_own(type(module), base):
        return f"{kind} is a {base.__name__} with code of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "weight is computed from others (weight norm, pruning)"
    if not weight.is_floating_point():
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if module._modules or module._buffers or module._parameters.keys() - {"weight", "bias"}:
        return "holds modules, parameters or buffers beside its weight and bias"
    if "forward" in module.__dict__:
        return "forward is replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    return None


def _has_code_of_its_own(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Tell whether a subclass defines anew what its base has, other than how it is made and shown.

    One that does not, such as torchvision's Conv3DSimple, runs as its base.
    """
    between = kind.__mro__[: kind.__mro__.index(base)]
    known = (ancestor for ancestor in between if f"{ancestor.__module__}.{ancestor.__qualname__}" not in _LIKE_TORCHS)
    own = {name for ancestor in known for name in vars(ancestor)}
    own -= {"reset_parameters", "extra_repr"}
    called = ("__call__", "__getattr__", "__getattribute__")
    return any(name in called or (hasattr(base, name) and not name.startswith("__")) for name in own)


def _use_reason(name: str, watched: Watched) -> str | None:
    readers = watched.readers.get(name, [])
    if name not in watched.calls:
        return f"not called, its weight is used by {_or_model(readers)}" if readers else "not called"
    return f"weight is also used by {_or_model(readers)}" if readers else None


def _or_model(names: list[str]) -> str:
    return ", ".join(name or "the model itself" for name in names)
