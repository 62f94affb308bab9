"""What all factorised layers share, and the linear one: they hold Kronecker factors, and run without the kernel."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.errors import SpecError
from kronsearch.sekron.decomposition import decompose
from kronsearch.sekron.execution import Geometry, Stage, plan_stages
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import reconstruct

__all__ = ["Conv", "SeKronLayer", "SeKronLinear", "moved", "to_dense"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def moved(data: Tensor, sizes: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Tensor:
    """View data as `sizes`, put the dimensions into `order`, view as `shape`; copies only where something moves."""
    wide = [dim for dim in order if sizes[dim] != 1]
    if wide != sorted(wide):
        data = data.reshape(tuple(sizes)).permute(tuple(order))
    return data.reshape(tuple(shape))


class SeKronLayer(nn.Module):
    """Base of the factorised layers: parameters, the walk through the stages, and the way back to the kernel.

    Args:
        spec: sequence and ranks.
        geometry: of the layer.
        bias: whether there is one, (out channels,).
        dtype: of the parameters.
        device: of the parameters.
    """

    factors: nn.ParameterList
    bias: nn.Parameter | None

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
        examples = len(data)
        first, *others = self.stages
        later = self.spec.factor_shapes[-1][0]  # F_{k+1}…F_S, the out channels that are done
        data = data.reshape(examples * first.batch, first.groups * first.group_in, *data.shape[2:])
        data = self._stage(first, data, self._weight(first), None if others else self.bias)
        for stage in others:
            last = stage is others[-1]
            data = self._follow(stage, data, examples, later, self.bias if last and later == 1 else None)
            later *= self.spec.factor_shapes[stage.factor][0]
        if self.bias is not None and others and later != self.spec.factor_shapes[0][0]:
            data = data + self.bias.to(data.dtype).reshape(-1, *(1,) * (data.ndim - 2))  # the dtype is autocast's
        return data

    def _follow(self, stage: Stage, data: Tensor, examples: int, later: int, bias: Tensor | None) -> Tensor:
        """Run a stage on (examples · batch · C_k, ranks · later, *positions), where `later` stands for F_{k+1}…F_S.

        Returns:
            (examples · batch, the ranks that are left · F_k · later, *positions).
        """
        outer, positions = stage.batch // later, data.shape[2:]
        rank = self.spec.ranks[stage.factor]
        in_channels = stage.group_in // rank
        if outer == stage.groups == 1 and later > 1 and self._is_pointwise(stage):
            # a 1×1 stage doesn't care which positions it sees: the done channels go there, and nothing is moved
            data = data.reshape(examples, stage.group_in, later * positions[0], *positions[1:])
            data = self._stage(stage, data, self._weight(stage), bias)
            return data.reshape(examples, stage.group_out * later, *positions)
        # the layer's groups lie outside of the stage's in channels, the earlier ranks inside
        own = self.geometry.groups if stage.factor == 0 else 1
        sizes = (examples, outer, own, in_channels, stage.groups // own, rank, later, *positions)
        shape = (examples * outer * later, stage.groups * stage.group_in, *positions)
        data = moved(data, sizes, (0, 1, 6, 2, 4, 3, 5, *range(7, len(sizes))), shape)
        data = self._stage(stage, data, self._weight(stage), bias)
        positions = data.shape[2:]
        channels = stage.groups * stage.group_out
        sizes = (examples * outer, later, channels, *positions)
        return moved(data, sizes, (0, 2, 1, *range(3, len(sizes))), (examples * outer, channels * later, *positions))

    @staticmethod
    def _is_pointwise(stage: Stage) -> bool:
        geometry = stage.geometry
        alone = all(n == 1 for n in (*stage.extent, *geometry.stride)) and not any(map(sum, geometry.padding))
        return alone and bool(stage.extent)

    def _weight(self, stage: Stage) -> Tensor:
        """View a factor as the weight (groups · group_out, group_in, *extent) of its stage."""
        factor: Tensor = self.factors[stage.factor]
        out_channels, in_channels, *extent = self.spec.factor_shapes[stage.factor]
        if stage.factor < self.spec.sequence_length - 1:
            rank = self.spec.ranks[stage.factor]
            factor = factor.reshape(-1, rank, out_channels, in_channels, *extent)
            factor = factor.permute(0, 2, 3, 1, *range(4, factor.ndim))
        return factor.reshape(stage.groups * stage.group_out, stage.group_in, *extent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Module.to(memory_format=channels_last) takes a factor of five dimensions for an image, and fails on it
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.flatten()).reshape(t.shape) if t.ndim > 4 else fn(t), recurse
        )
        return self

    @abstractmethod
    def _stage(self, stage: Stage, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run one stage on data (batch, groups · group_in, *positions)."""

    def extra_repr(self) -> str:
        """Show the spec beside the geometry."""
        return f"{self.spec}, {self.geometry}, bias={self.bias is not None}"


class SeKronLinear(SeKronLayer):
    """A linear layer whose weight is a sum of Kronecker products; it runs without forming the weight.

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

    def to_linear(self) -> nn.Linear:
        """Return the dense linear layer of the reconstructed weight."""
        out_features, in_features = self.spec.kernel_shape
        dtype = self.factors[0].dtype
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, dtype=dtype, device="meta")
        return to_dense(self, linear)

    def forward(self, data: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features)."""
        rows = self.run(data.reshape(-1, data.shape[-1]))
        return rows.reshape(*data.shape[:-1], rows.shape[-1])

    def _stage(self, stage: Stage, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if stage.groups == 1:
            return F.linear(data, weight, bias)
        inputs = data.reshape(len(data), stage.groups, stage.group_in).transpose(0, 1)
        weights = weight.reshape(stage.groups, stage.group_out, stage.group_in).transpose(1, 2)
        return torch.bmm(inputs, weights).transpose(0, 1).reshape(len(data), stage.groups * stage.group_out)


Dense = TypeVar("Dense", nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def to_dense(layer: SeKronLayer, dense: Dense) -> Dense:
    """Fill a dense layer, made on the meta device so that no initialisation is drawn, from a factorised one."""
    dense = dense.to_empty(device=layer.factors[0].device)
    with torch.no_grad():
        dense.weight.copy_(layer.kernel)
        if layer.bias is not None and dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.train(layer.training)
