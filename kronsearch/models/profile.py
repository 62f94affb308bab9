"""What a network costs, layer by layer: MACs as fvcore counts them (its "flop"), parameters, and the calls' sizes."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kronsearch.errors import ModelError, first_line
from kronsearch.models.dense import KERNEL_OWNERS, Watched, dense_reasons, watch_forward
from kronsearch.models.probe import unfit_layers
from kronsearch.models.trace_ops import FREE_OPS, HANDLERS
from kronsearch.sekron.convolution import conv_geometry
from kronsearch.sekron.execution import Geometry, dense_macs
from kronsearch.sekron.layers import Conv
from kronsearch.training.copies import check_network

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts a loss that nobody here uses
    from fvcore.nn import FlopCountAnalysis

__all__ = ["LayerCost", "ModelCost", "profile_model"]


@dataclass(frozen=True)
class LayerCost:
    """What one module costs by itself, its submodules not included.

    name: dotted name, "" for the model itself
    kind: class name
    kernel_shape: shape of the weight of a convolution or linear layer, None if that is not a parameter of the module
    macs: multiply-accumulates for one example, all calls together
    params: entries of its own parameters
    calls: one entry a call and image: the spatial input size of a convolution, (rows,) of a linear layer
    keeps_dense: why it can't be replaced, None if it can
    geometry: stride, dilation, padding and groups of a layer that can be replaced, None of others
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...] | None
    macs: int
    params: int
    calls: tuple[tuple[int, ...], ...]
    keeps_dense: str | None
    geometry: Geometry | None = None

    @property
    def kernel_macs(self) -> int:
        """The MACs of its kernel alone, all calls together; 0 of a layer that can't be replaced."""
        if self.geometry is None or self.kernel_shape is None:
            return 0
        return sum(dense_macs(self.kernel_shape, self.geometry, call) for call in self.calls)

    @property
    def kernel_params(self) -> int:
        """The entries of its kernel; 0 where it has none."""
        return 0 if self.kernel_shape is None else prod(self.kernel_shape)


@dataclass(frozen=True)
class ModelCost:
    """What a network costs: the MACs of its layers add up to `macs`; `params` counts a shared parameter once.

    `layers` holds every module that owns parameters or MACs, in the order of execution, those never called last.
    `input_shape` is without the batch.
    """

    macs: int
    params: int
    layers: tuple[LayerCost, ...]
    input_shape: tuple[int, ...]

    def layer(self, name: str) -> LayerCost:
        """Return the layer called `name`; ModelError with the closest names if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        close = get_close_matches(name, [layer.name for layer in self.layers])
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {len(self.layers)} others"
        raise ModelError(f"the network has no layer {name!r} with parameters or MACs: {hint}")


def profile_model(model: nn.Module, *, input_shape: tuple[int, ...]) -> ModelCost:
    """Measure `model` in eval mode on one example of zeros of `input_shape` (without the batch), on its own device.

    The model is left as it was found. Raises ModelError if it can't run on such an input, or if it runs an operator
    whose cost nobody knows.
    """
    example = _example(model, input_shape)
    with _left_as_found(model) as fast_attention, torch.no_grad():
        with _as_model_error(f"{type(model).__name__} has no eval mode"):
            model.eval()
        asked = f"an input of shape (1, {', '.join(map(str, input_shape))})"
        with _as_model_error(f"{type(model).__name__} can't run on {asked}"):
            watched = watch_forward(model, example)
        with _as_model_error(f"the operators of {type(model).__name__} can't be counted"):
            macs = _own_macs(model, example)
        reasons = dense_reasons(model, watched)
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        unfit = unfit_layers(model, example, [name for name, reason in reasons.items() if reason is None])
    return ModelCost(
        macs=sum(macs.values()),
        params=sum(parameter.numel() for parameter in model.parameters()),
        layers=_layers(model, macs, watched, {**reasons, **unfit}),
        input_shape=tuple(input_shape),
    )


def _layers(
    model: nn.Module, macs: Mapping[str, int], watched: Watched, reasons: Mapping[str, str | None]
) -> tuple[LayerCost, ...]:
    modules = dict(model.named_modules())
    costs = []
    for name in dict.fromkeys((*watched.order, *modules)):
        module = modules[name]
        params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        weight = module._parameters.get("weight") if isinstance(module, KERNEL_OWNERS) else None
        if params or macs[name]:
            costs.append(
                LayerCost(
                    name=name,
                    kind=type(module).__name__,
                    kernel_shape=tuple(weight.shape) if weight is not None else None,
                    macs=macs[name],
                    params=params,
                    calls=tuple(watched.calls.get(name, ())),
                    keeps_dense=reasons[name],
                    geometry=_geometry(module) if reasons[name] is None else None,
                )
            )
    return tuple(costs)


def _geometry(module: nn.Module) -> Geometry | None:
    if isinstance(module, Conv):
        return conv_geometry(module)
    return Geometry() if isinstance(module, nn.Linear) else None


def _own_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return each module's MACs without those of its submodules; ModelError for an operator of unknown cost."""
    analysis = FlopCountAnalysis(model, (example,)).set_op_handle(**HANDLERS)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    totals = {name: Counter(macs=round(count)) for name, count in analysis.by_module().items()}
    uncounted = {name: Counter(analysis.unsupported_ops(name)) for name in totals}
    places: dict[str, list[str]] = {}
    for name, ops in _without_children(uncounted).items():
        for op in sorted(op for op, n in ops.items() if n and op not in FREE_OPS):
            places.setdefault(op, []).append(name or type(model).__name__)
    if places:
        told = "; ".join(f"{op.removeprefix('aten::')} in {_first_few(names)}" for op, names in places.items())
        raise ModelError(
            f"the MACs of {type(model).__name__} can't be counted, because it runs {told}; "
            "convolutions, linear and recurrent layers, products of matrices, attention and elementwise operators can"
        )
    return {name: count["macs"] for name, count in _without_children(totals).items()}


def _without_children(counts: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
    own = {name: Counter(count) for name, count in counts.items()}
    for name, count in counts.items():
        if name:
            own[name.rpartition(".")[0]].subtract(count)
    return own


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more modules" if len(names) > 3 else "")


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    if not input_shape or min(input_shape) < 1:
        raise ModelError(f"an input of shape {tuple(input_shape)} is empty; give positive sizes without the batch")
    _check_countable(model)
    tensors = list(chain(model.parameters(), model.buffers()))
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    place = next((tensor.device for tensor in tensors), "cpu")
    return torch.zeros(1, *input_shape, dtype=dtype, device=place)


def _check_countable(model: nn.Module) -> None:
    """Raise ModelError for a network that can't be run yet, or not be traced."""
    check_network(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{type(model).__name__} is a script: pass the network that it was made of")
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(is_lazy(tensor) for tensor in tensors):
        raise ModelError(
            f"{type(model).__name__} has lazy layers, whose sizes are not known yet; call the model once before"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ModelError(f"{type(model).__name__} has tensors on the meta device, which hold no values; load it first")
    if (slashed := next((name for name, _ in model.named_modules() if "/" in name), None)) is not None:
        raise ModelError(
            f"{type(model).__name__} has a module named {slashed!r}: with a slash none can be counted, give it another"
        )
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is compiled: pass the network as it was before (`model._orig_mod`, or one whose "
            "compile() was not called), and compile what becomes of it"
        )


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[bool]:
    """Restore modes, hooks and buffers on leaving.

    fvcore leaves its hooks behind when a trace fails, and a network may count its calls in a buffer. Inside, attention
    runs by its plain operators, because its fused kernel is one that fvcore can't see into. What is given tells whether
    it would run by that.
    """
    modes = {module: module.training for module in model.modules()}
    hooks = {module: (set(module._forward_hooks), set(module._forward_pre_hooks)) for module in model.modules()}
    buffers = [(own, own.clone()) for own in model.buffers() if own.layout == torch.strided and not own.is_inference()]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield fast_attention
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        with torch.no_grad():
            for own, before in buffers:
                if not torch.equal(own, before):
                    own.copy_(before)
        for module, mode in modes.items():
            module.training = mode
            for kept, now in zip(hooks[module], (module._forward_hooks, module._forward_pre_hooks), strict=True):
                for key in set(now) - kept:
                    del now[key]


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{what}: {type(error).__name__}{': ' * bool(reason)}{reason}") from error
