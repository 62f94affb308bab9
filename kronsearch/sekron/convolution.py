"""Factorised convolutions of one, two and three axes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.errors import SpecError
from kronsearch.sekron.execution import Geometry, Stage, plan_stages
from kronsearch.sekron.forming import form_kernels, rounded
from kronsearch.sekron.inference import Step, across, along, crosses, is_channels_last
from kronsearch.sekron.layers import Conv, SeKronLayer, to_dense
from kronsearch.sekron.layout import Move, plan_layout
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import Run, SeKronSpec, all_merged

__all__ = [
    "ONEDNN_BLOCK",
    "SeKronConv",
    "SeKronConv1d",
    "SeKronConv2d",
    "SeKronConv3d",
    "conv_geometry",
    "conv_like",
    "kernels_formed",
]

# With channels last throughout, layers of two factors (64 channels at 28 x 28, 32 at 32 x 32, one thread) take 0.5 to
# 0.8 of the time without moves, 0.7 to 0.9 with one, 0.9 to 1.3 with two: medians for each width of the groups.
_MOVES = 2
ONEDNN_BLOCK = 16  # channels that its kernels for CPUs take at once, at the most


def conv_geometry(conv: Conv) -> Geometry:
    """Return a convolution's geometry; what zero padding inside of a stage can't do becomes padding beforehand."""
    extent = conv.kernel_size
    if conv.padding == "same":
        padding = same_padding(extent, conv.dilation)
    elif conv.padding == "valid":
        padding = ((0, 0),) * len(extent)
    else:
        padding = tuple((int(p), int(p)) for p in conv.padding)
    geometry = Geometry(tuple(conv.stride), tuple(conv.dilation), padding, groups=conv.groups)
    return replace(geometry, padded_first=is_uneven(geometry) or conv.padding_mode != "zeros")


def same_padding(extent: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return what `padding="same"` means on each axis: (before, after), an odd one behind."""
    spans = [d * (k - 1) for d, k in zip(dilation, extent, strict=True)]
    return tuple((span // 2, span - span // 2) for span in spans)


def is_uneven(geometry: Geometry) -> bool:
    """Tell whether an axis is padded differently before and after, which a convolution can't do by itself."""
    return any(before != after for before, after in geometry.padding)


class SeKronConv(SeKronLayer):
    """A convolution whose kernel is a sum of Kronecker products; it runs as its spec says, mostly without the kernel.

    Args:
        spec: sequence and ranks of the kernel (out channels, in channels / groups, *extent).
        geometry: stride, dilation, padding, groups.
        bias: whether there is one.
        padding_mode: as that of torch's convolutions.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        SpecError: spec or geometry are not of as many axes as this class, or the first factor's out channels can't be
            divided by the groups.
    """

    axes: ClassVar[int]
    dense_class: ClassVar[type[Conv]]
    convolve: ClassVar[Callable[..., Tensor]]
    _formed: tuple[tuple[Stage, Tensor], ...] | None = None  # see kernels_formed

    def __init__(
        self,
        spec: SeKronSpec,
        geometry: Geometry,
        *,
        bias: bool = True,
        padding_mode: str = "zeros",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        modes = self.axes + 2
        if len(spec.kernel_shape) != modes:
            raise SpecError(
                f"a {self.axes}-d convolution has a kernel of {modes} modes, {spec} has {len(spec.kernel_shape)}"
            )
        if {len(geometry.stride), len(geometry.dilation), len(geometry.padding)} != {self.axes}:
            raise SpecError(f"a {self.axes}-d convolution takes a geometry of {self.axes} axes, not {geometry}")
        geometry = replace(
            geometry, padded_first=geometry.padded_first or is_uneven(geometry) or padding_mode != "zeros"
        )
        super().__init__(spec, geometry, bias=bias, dtype=dtype, device=device)
        self.padding_mode = padding_mode
        self._last_layout = plan_layout(spec, geometry, self.stages, channels_last=True)
        self._crosses = crosses(self.stages, self._last_layout)
        self._stays_last = self._last_layout.moves < _MOVES

    @classmethod
    def from_conv(
        cls, conv: Conv, spec: SeKronSpec, *, metric: Metric | None = None, refine: bool | None = None
    ) -> Self:
        """Factorise a convolution.

        Raises:
            SpecError: the convolution has another number of axes or is a transposed one, the spec's shapes don't
                multiply to its kernel's, or the first factor's out channels can't be divided by its groups.
        """
        if not isinstance(conv, cls.dense_class):
            raise SpecError(f"a {cls.__name__} is made from a {cls.dense_class.__name__}, not from {conv}")
        spec.check_kernel(conv.weight.shape)
        return cls.empty(conv, spec).load_layer(conv, metric, refine)

    @classmethod
    def empty(cls, conv: Conv, spec: SeKronSpec) -> Self:
        """Return the factorised layer of a convolution with factors of zeros."""
        return cls(
            spec,
            conv_geometry(conv),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            dtype=conv.weight.dtype,
            device=conv.weight.device,
        )

    # what networks ask their convolutions for, by the names that torch's have
    @property
    def in_channels(self) -> int:
        """The channels of all groups of an input."""
        return self.spec.kernel_shape[1] * self.geometry.groups

    @property
    def out_channels(self) -> int:
        """The channels of all groups of an output."""
        return self.spec.kernel_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The kernel's extent on each axis."""
        return self.spec.kernel_shape[2:]

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride on each axis."""
        return self.geometry.stride

    @property
    def dilation(self) -> tuple[int, ...]:
        """The dilation on each axis."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.geometry.groups

    @property
    def padding(self) -> str | tuple[int, ...]:
        """The padding on each axis, or "same" where it is another behind than before.

        Raises:
            SpecError: it is uneven in a way that torch's convolutions don't have.
        """
        geometry = self.geometry
        if not is_uneven(geometry):
            return tuple(before for before, _ in geometry.padding)
        no_stride = all(step == 1 for step in geometry.stride)
        if no_stride and geometry.padding == same_padding(self.kernel_size, geometry.dilation):
            return "same"
        raise SpecError(
            f"no convolution of torch has the padding {geometry.padding}: only the uneven one of 'same' can be kept"
        )

    def to_conv(self) -> Any:
        """Return the dense convolution (`nn.Conv1d`, `2d` or `3d`) of the reconstructed kernel.

        Raises:
            SpecError: the padding is uneven in a way that torch's convolutions don't have.
        """
        make: Callable[..., Any] = self.dense_class
        conv = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            dtype=self.factors[0].dtype,
            device="meta",
        )
        return to_dense(self, conv)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- as torch's layers name it
        """Convolve (examples, in channels, *positions); an input without examples is taken as one."""
        data = input
        if data.ndim == self.axes + 1:
            return self.forward(data[None])[0]
        if self.geometry.padded_first:
            widths = [n for pair in reversed(self.geometry.padding) for n in pair]
            data = F.pad(data, widths, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if self._formed is None:
            return self.run(data)
        for stage, weight in self._formed:
            data = self._stage(stage, data, weight, self.bias if stage is self._formed[-1][0] else None)
        return data

    def _infer(self, data: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        if data.device.type != "cpu" or data.ndim != 4:
            return super()._infer(data, tensors)
        last = is_channels_last(data)
        if not last and not self._crosses:
            return super()._infer(data, tensors)
        if last and not self._stays_last:
            return super()._infer(data.contiguous(), tensors).contiguous(memory_format=torch.channels_last)
        for step in self._keep(tensors, last, lambda: self._steps(last)):
            data = step(data)
        return self._with_bias(data)

    def _steps(self, last: bool) -> list[Step]:
        """Return the steps for images with channels last, or for contiguous ones."""
        weights = self._weights(tuple(self.factors), self._last_layout)
        bias = self.bias if self._bias_in_stage else None
        if last:
            return list(along(self.stages, self._last_layout, weights, bias))
        return list(across(self.stages, weights, bias))

    def _stage(self, stage: Stage, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve, geometry = type(self).convolve, stage.geometry
        if weight.requires_grad and stage.group_in < ONEDNN_BLOCK and stage.picks:
            # with channels last, oneDNN's gradient of float32 kernels writes where it mustn't (its issue 6035)
            steps = (slice(None, None, step) for step in geometry.stride)
            return convolve(data[(slice(None), slice(None), *steps)], weight, bias)
        return convolve(data, weight, bias, geometry.stride, geometry.padding_inside, geometry.dilation, stage.groups)


class SeKronConv1d(SeKronConv):
    """`SeKronConv` of one axis."""

    axes = 1
    dense_class = nn.Conv1d
    convolve = staticmethod(F.conv1d)


class SeKronConv2d(SeKronConv):
    """`SeKronConv` of two axes."""

    axes = 2
    dense_class = nn.Conv2d
    convolve = staticmethod(F.conv2d)


class SeKronConv3d(SeKronConv):
    """`SeKronConv` of three axes."""

    axes = 3
    dense_class = nn.Conv3d
    convolve = staticmethod(F.conv3d)


def conv_like(conv: Conv) -> type[SeKronConv]:
    """Return the factorised class of a convolution."""
    return next(kind for kind in (SeKronConv1d, SeKronConv2d, SeKronConv3d) if isinstance(conv, kind.dense_class))


@contextmanager
def kernels_formed(
    model: nn.Module, dtype: torch.dtype | None = None, runs: Mapping[str, Run] | None = None
) -> Iterator[None]:
    """Form the kernels of a model's factorised convolutions, which then run as dense ones, with the same outputs.

    That is what batches are trained on: forming a kernel costs as much as a few positions of one example, gradients
    reach the factors through it, and no outputs of stages have to be kept. A training step of ResNet-32 at half the
    MACs takes half the time, for the stages' depthwise convolutions have slow gradients. Where stages are faster all
    the same (`plan_training`), their weights are formed instead.

    The kernels are those of the factors at the start, with gradients if they are enabled then, for one backward pass:
    inside, where what the forward pass computes is computed again for it (gradient checkpointing).

    Args:
        model: the network.
        dtype: what kernels are rounded to: that of autocast, where the network runs under it; None leaves them as they
            are.
        runs: of layers that run in stages over plain channels, by their dotted names.
    """
    runs = runs or {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SeKronConv) and module._formed is None
    }
    whole = {name: layer for name, layer in layers.items() if name not in runs}
    specs, factors = [layer.spec for layer in whole.values()], [layer._factors() for layer in whole.values()]
    kernels = form_kernels(specs, factors, dtype)
    formed = dict(zip(whole, kernels, strict=True))
    try:
        for name, layer in layers.items():
            stages, digits = _training_stages(layer.spec, layer.geometry, runs.get(name))
            weights = [formed[name]] if name in formed else _stage_weights(layer, stages, digits, dtype)
            layer._forget()
            layer._formed = tuple(zip(stages, weights, strict=True))
        yield
    finally:
        for layer in layers.values():
            layer._formed = None


def _stage_weights(
    layer: SeKronConv, stages: Sequence[Stage], digits: Sequence[Move], dtype: torch.dtype | None
) -> list[Tensor]:
    """Form the weights of stages in the factors' own precision, inside of autocast too, and round them."""
    factors = layer._factors()
    with torch.autocast(factors[0].device.type, enabled=False):
        weights = [layer._weight(factors, stage, move) for stage, move in zip(stages, digits, strict=True)]
    return [weight.to(rounded(weight.dtype, dtype)) for weight in weights]


@lru_cache(maxsize=2**14)  # asked for at each step
def _training_stages(
    spec: SeKronSpec, geometry: Geometry, run: Run | None
) -> tuple[tuple[Stage, ...], tuple[Move, ...]]:
    """Return the stages of a run, by default of all factors merged, and the order of the digits of their weights."""
    spec = replace(spec, run=all_merged(spec.sequence_length) if run is None else run)
    stages = plan_stages(spec, geometry)
    return stages, tuple(view.weight for view in plan_layout(spec, geometry, stages).views)
