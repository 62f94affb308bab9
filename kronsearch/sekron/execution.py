"""The stages in which a factorised layer runs, and what they cost. Ints only.

The order is last factor first. After stages S…k+1 the data have the dimensions
`(N, C_1…C_k, ranks, F_{k+1}…F_S, *positions)`. The ranks are R_1…R_k in a tree, where stage k sums over `R_k` and `C_k`
inside of one grouped convolution with `R_1…R_{k-1}` groups and puts `F_k` out channels in each; in a chain they are R_k
alone, and stage k is one convolution from `R_k·C_k` to `R_{k-1}·F_k` channels. Its factor's taps lie as far apart as
the later factors are wide. The kernel is never formed.

The groups of a grouped layer are the most significant digit of its out channels: they belong to the first factor, whose
stage has as many more groups; all other stages do the same to every group, as to more examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from kronsearch.errors import SpecError
from kronsearch.sekron.shapes import holds_groups
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["Geometry", "Stage", "count_macs", "dense_macs", "plan_stages"]


@dataclass(frozen=True)
class Geometry:
    """Stride, dilation and padding of a layer: one entry for each spatial axis, none at all for a linear layer.

    Args:
        stride: steps between outputs.
        dilation: steps between the kernel's taps.
        padding: (before, after) on each axis.
        padded_first: whether the padding is added to the input beforehand, as for a padding mode other than zeros.
        groups: of the layer; its kernel has (out channels, in channels / groups, *extent).
    """

    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padded_first: bool = False
    groups: int = 1

    def output_size(self, input_size: Sequence[int], extent: Sequence[int]) -> tuple[int, ...]:
        """Return the number of output positions on each axis for a kernel of this extent."""
        return tuple(
            (n + sum(pad) - d * (k - 1) - 1) // s + 1
            for n, pad, d, k, s in zip(input_size, self.padding, self.dilation, extent, self.stride, strict=True)
        )


@dataclass(frozen=True)
class Stage:
    """One grouped convolution of a factorised layer.

    Args:
        factor: the index of the factor that is its weight.
        batch: by how much the stage's batch exceeds the number of examples: C_1…C_{k-1} · F_{k+1}…F_S, and the layer's
            groups for all factors but the first.
        groups: for the first factor the layer's; for later ones in a tree R_1…R_{k-1}, otherwise 1.
        group_in: in channels of each group, R_k · C_k.
        group_out: out channels of each group: F_k, in a chain R_{k-1} · F_k; for the last factor none of its sums is
            done yet, and the ranks in front are those of its own.
        extent: the factor's spatial extent.
        geometry: the stage's own stride, dilation and padding.
    """

    factor: int
    batch: int
    groups: int
    group_in: int
    group_out: int
    extent: tuple[int, ...]
    geometry: Geometry

    def macs(self, output_size: Sequence[int]) -> int:
        """Return the multiply-accumulates for one example with this many output positions on each axis."""
        return self.batch * prod(output_size) * self.groups * self.group_in * self.group_out * prod(self.extent)


def plan_stages(spec: SeKronSpec, geometry: Geometry) -> tuple[Stage, ...]:
    """Return the stages of a layer in the order in which they run.

    On each axis the padding belongs to the first stage that has an extent there (it can't be seen by an earlier one),
    the stride to the last one that has (an earlier one must see every position). Where no stage has an extent, both
    belong to the first stage, which then runs on the fewest positions.

    Raises:
        SpecError: the first factor's out channels are not a multiple of the layer's groups.
    """
    shapes, ranks, last = spec.factor_shapes, spec.ranks, spec.sequence_length - 1
    if not holds_groups(shapes, geometry.groups):
        raise SpecError(
            f"the first factor of {spec} has {shapes[0][0]} out channels, which a layer of {geometry.groups} groups "
            "can't divide: its groups are the most significant digit of the out channels"
        )
    order = range(last, -1, -1)
    axes = range(len(geometry.stride))
    padding_at, stride_at = [], []
    for axis in axes:
        wide = [k for k in order if shapes[k][2 + axis] > 1] or [last]
        padding_at.append(wide[0])
        stride_at.append(wide[-1])
    stages = []
    for k in order:
        out_channels, in_channels, *extent = shapes[k]
        later = shapes[k + 1 :]
        before = prod(spec.rank_shape(k)[:-1] if k < last else spec.rank_shape(k))  # the ranks that the stage leaves
        split = k < last and spec.coupling == "tree"  # in a tree an earlier rank's data meet that rank's factor only
        own_groups = geometry.groups if k == 0 else 1
        stages.append(
            Stage(
                factor=k,
                batch=(1 if k == 0 else geometry.groups)
                * prod(shape[1] for shape in shapes[:k])
                * prod(shape[0] for shape in later),
                groups=own_groups * (before if split else 1),
                group_in=in_channels if k == last else ranks[k] * in_channels,
                group_out=(1 if split else before) * out_channels // own_groups,
                extent=tuple(extent),
                geometry=Geometry(
                    stride=tuple(geometry.stride[a] if stride_at[a] == k else 1 for a in axes),
                    dilation=tuple(geometry.dilation[a] * prod(shape[2 + a] for shape in later) for a in axes),
                    padding=tuple(
                        geometry.padding[a] if padding_at[a] == k and not geometry.padded_first else (0, 0)
                        for a in axes
                    ),
                ),
            )
        )
    return tuple(stages)


def count_macs(spec: SeKronSpec, geometry: Geometry, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of a factorised layer for one example.

    Args:
        spec: sequence and ranks.
        geometry: of the layer.
        input_size: the input's extent on each spatial axis; for a linear layer (tokens,), its positions.
    """
    if not geometry.stride:
        return prod(input_size) * sum(stage.macs(()) for stage in plan_stages(spec, geometry))
    size = tuple(input_size)
    if geometry.padded_first:
        size = tuple(n + sum(pad) for n, pad in zip(size, geometry.padding, strict=True))
    total = 0
    for stage in plan_stages(spec, geometry):
        size = stage.geometry.output_size(size, stage.extent)
        total += stage.macs(size)
    return total


def dense_macs(kernel_shape: Sequence[int], geometry: Geometry, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of the dense layer for one example, its bias not counted."""
    return count_macs(SeKronSpec((tuple(kernel_shape),)), geometry, input_size)
