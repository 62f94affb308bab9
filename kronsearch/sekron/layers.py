"""What all factorised layers share, and the linear one: they hold Kronecker factors, and run them in stages."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.errors import SpecError
from kronsearch.sekron.decomposition import decompose
from kronsearch.sekron.execution import Geometry, Stage, plan_stages
from kronsearch.sekron.inference import Kept, may_keep, moved
from kronsearch.sekron.layout import Layout, Move, plan_layout
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import merge, reconstruct

__all__ = ["Conv", "SeKronLayer", "SeKronLinear", "to_dense"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class SeKronLayer(nn.Module):
    """Base of the factorised layers: parameters, the walk through the stages, and the way back to the kernel.

    In eval mode, without gradients, the weights of the stages are formed once and kept until the factors change or are
    trained. What is written to `factor.data`, or through another library, can't be noticed, nor a step of a fused
    optimiser whose gradients were dropped since and came from a compiled run, or from `kernel` alone: call `eval()`
    after it.

    Args:
        spec: sequence and ranks.
        geometry: of the layer.
        bias: whether there is one, (out channels,).
        dtype: of the parameters.
        device: of the parameters.
    """

    factors: nn.ParameterList
    bias: nn.Parameter | None
    _kept: Kept | None = None

    def __init__(
        self,
        spec: SeKronSpec,
        geometry: Geometry,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.geometry = spec, geometry
        self.stages = plan_stages(spec, geometry)
        self._layout = plan_layout(spec, geometry, self.stages)
        self._bias_in_stage = self.stages[-1].groups * self.stages[-1].group_out == spec.kernel_shape[0]
        self._names = tuple(map(str, range(spec.sequence_length)))
        self.factors = nn.ParameterList(torch.zeros(shape, dtype=dtype, device=device) for shape in spec.tensor_shapes)
        zeros = torch.zeros(spec.kernel_shape[0], dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def kernel(self) -> Tensor:
        """The kernel that the factors stand for, formed anew, differentiable."""
        return reconstruct(tuple(self.factors), self.spec)

    def load_layer(self, layer: Conv | nn.Linear, metric: Metric | None, refine: bool | None) -> Self:
        """Fill the factors from a dense layer's kernel, and copy its bias, corrected by the metric's mean input."""
        factors = decompose(layer.weight, self.spec, metric=metric, refine=refine)
        with torch.no_grad():
            for parameter, factor in zip(self.factors, factors, strict=True):
                parameter.copy_(factor)
            if self.bias is not None and layer.bias is not None:
                self.bias.copy_(layer.bias)
                if metric is not None and metric.moments.mean is not None:
                    lost = (layer.weight.double() - self.kernel.double()).flatten(1)
                    means = metric.moments.mean.to(lost).reshape(-1, lost.shape[1], 1)  # a row for each group
                    self.bias.add_((lost.reshape(len(means), -1, lost.shape[1]) @ means).flatten().to(self.bias.dtype))
        self.train(layer.training)
        self.factors.requires_grad_(layer.weight.requires_grad)
        if self.bias is not None and layer.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self

    def run(self, data: Tensor) -> Tensor:
        """Run all stages on data (examples, in channels, *positions), and add the bias."""
        factors = self._factors()
        if not self.training:
            bias = self.bias
            if may_keep(tensors := factors if bias is None else [*factors, bias]):
                return self._infer(data, tensors)
        self._forget()
        return self._walk(data, self._weights(factors, self._layout))

    def _factors(self) -> list[Tensor]:
        """Return the factors; to go through their list takes ten times as long, and is for those that aren't plain."""
        plain = self.factors._parameters
        if tuple(plain) == self._names:  # not pruned, parametrised or in a replica of DataParallel
            return [factor for factor in plain.values() if factor is not None]
        return list(self.factors)

    def _infer(self, data: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Do the same in eval mode without gradients; the parameters are the factors, and the bias behind them."""
        return self._walk(data, self._keep(tensors, None, self._contiguous_weights))

    def _keep(self, tensors: Sequence[Tensor], way: object, form: Callable[[], Sequence[Any]]) -> tuple[Any, ...]:
        """Return what was formed of the parameters to run in this way, formed anew only if they have changed."""
        kept = self._kept  # another thread may put something else there meanwhile
        if kept is None or not kept.fit(tensors, way):
            kept = Kept.of(tensors, way, form)
            self._kept = None if tensors[0].is_meta else kept  # of which nothing can tell whether it has changed
        return kept.formed

    def _contiguous_weights(self) -> list[Tensor]:
        return [weight.contiguous() for weight in self._weights(tuple(self.factors), self._layout)]

    def _forget(self) -> None:
        """Drop the weights that are kept."""
        if self._kept is not None and not torch.compiler.is_compiling():
            self._kept = None

    def _walk(self, data: Tensor, weights: Sequence[Tensor]) -> Tensor:
        # a length, unlike a size, would fix the batch of an exported network
        examples, positions, out_channels = data.shape[0], data.shape[2:], self.spec.kernel_shape[0]
        last, bias = self.stages[-1], self.bias if self._bias_in_stage else None
        for stage, view, weight in zip(self.stages, self._layout.views, weights, strict=True):
            if not view.ready:
                channels = stage.groups * stage.group_in
                longer = positions if view.back == 1 else (view.back * positions[0], *positions[1:])
                data = moved(data, view.data, (examples * view.front, channels, *longer), (examples,), positions)
            data = self._stage(stage, data, weight, bias if stage is last else None)
            positions = data.shape[2:] if view.back == 1 else positions
        if not self._layout.ready:
            data = moved(data, self._layout.outputs, (examples, out_channels, *positions), (examples,), positions)
        return self._with_bias(data)

    def _with_bias(self, data: Tensor) -> Tensor:
        """Add the bias, where the last stage can't."""
        if self.bias is None or self._bias_in_stage:
            return data
        return data + self.bias.to(data.dtype).reshape(-1, *(1,) * (data.ndim - 2))  # the dtype is autocast's

    def _weights(self, factors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
        """Form the weights of all stages."""
        return [
            self._weight(factors, stage, view.weight) for stage, view in zip(self.stages, layout.views, strict=True)
        ]

    def _weight(self, factors: Sequence[Tensor], stage: Stage, digits: Move) -> Tensor:
        """View the factor of a stage as its weight (groups · group_out, group_in, *extent)."""
        shape = (stage.groups * stage.group_out, stage.group_in, *stage.extent)
        return moved(merge(factors, self.spec, stage.factors), digits, shape, (), stage.extent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        # Module.to(memory_format=channels_last) takes a factor of five dimensions for an image, and fails on it
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.flatten()).reshape(t.shape) if t.ndim > 4 else fn(t), recurse
        )
        return self

    def _load_from_state_dict(self, *told: Any) -> None:
        self._forget()  # what holds a parameter is in the way where torch swaps parameters
        super()._load_from_state_dict(*told)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as any module does, and drop the weights that were kept."""
        self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_formed")}

    @abstractmethod
    def _stage(self, stage: Stage, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run one stage on data (batch, groups · group_in, *positions)."""

    def extra_repr(self) -> str:
        """Show the spec beside the geometry."""
        return f"{self.spec}, {self.geometry}, bias={self.bias is not None}"


class SeKronLinear(SeKronLayer):
    """A linear layer whose weight is a sum of Kronecker products; it runs as its spec says, mostly without the weight.

    Args:
        spec: sequence and ranks of the weight (out features, in features).
        bias: whether there is one.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        SpecError: the spec's kernel has not two modes.
    """

    def __init__(
        self,
        spec: SeKronSpec,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if len(spec.kernel_shape) != 2:
            raise SpecError(f"a linear layer has a kernel of 2 modes, {spec} has {len(spec.kernel_shape)}")
        super().__init__(spec, Geometry(), bias=bias, dtype=dtype, device=device)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: SeKronSpec, *, metric: Metric | None = None, refine: bool | None = None
    ) -> Self:
        """Factorise a linear layer.

        Raises:
            SpecError: the spec's shapes don't multiply to the weight's.
        """
        spec.check_kernel(linear.weight.shape)
        return cls.empty(linear, spec).load_layer(linear, metric, refine)

    @classmethod
    def empty(cls, linear: nn.Linear, spec: SeKronSpec) -> Self:
        """Return the factorised layer of a linear one with factors of zeros."""
        weight = linear.weight
        return cls(spec, bias=linear.bias is not None, dtype=weight.dtype, device=weight.device)

    # what networks ask their linear layers for, by the names that torch's have
    @property
    def in_features(self) -> int:
        """The entries of a row that goes in."""
        return self.spec.kernel_shape[1]

    @property
    def out_features(self) -> int:
        """The entries of a row that comes out."""
        return self.spec.kernel_shape[0]

    def to_linear(self) -> nn.Linear:
        """Return the dense linear layer of the reconstructed weight."""
        dtype = self.factors[0].dtype
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=dtype, device="meta")
        return to_dense(self, linear)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- as torch's layers name it
        """Map (..., in features) to (..., out features)."""
        rows = self.run(input.reshape(-1, input.shape[-1]))
        return rows.reshape(*input.shape[:-1], rows.shape[-1])

    def _stage(self, stage: Stage, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if stage.groups == 1:
            return F.linear(data, weight, bias)
        inputs = data.reshape(data.shape[0], stage.groups, stage.group_in).transpose(0, 1)
        weights = weight.reshape(stage.groups, stage.group_out, stage.group_in).transpose(1, 2)
        return torch.bmm(inputs, weights).transpose(0, 1).reshape(data.shape[0], stage.groups * stage.group_out)


Dense = TypeVar("Dense", nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def to_dense(layer: SeKronLayer, dense: Dense) -> Dense:
    """Fill a dense layer, made on the meta device so that no initialisation is drawn, from a factorised one."""
    dense = dense.to_empty(device=layer.factors[0].device)
    with torch.no_grad():
        dense.weight.copy_(layer.kernel)
        if layer.bias is not None and dense.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.weight.requires_grad_(any(factor.requires_grad for factor in layer.factors))
    if layer.bias is not None and dense.bias is not None:
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)
