"""The stages in which a factorised layer runs, and what they cost. Ints only.

A layer runs its factors in the order of its spec's run, neighbours that the run merges as one factor. Between two
stages the data have the dimensions `(N, C digits of the factors to come, F digits of those done, ranks, *positions)`,
the ranks being those that a factor done shares with one to come. A stage is one grouped convolution: it sums over its
own C digit and over the ranks that no later stage needs, inside of each group; ranks that it has and that others need
still are its groups; ranks that it is the first to have become out channels beside its F digit; all else is batch. Its
taps lie as far apart as the factors of less significance are wide, done or not. The kernel is never formed, unless the
run merges all factors.

The groups of a grouped layer are the most significant digit of its out channels: they belong to the first factor, whose
stage has as many more groups; all other stages do the same to every group, as to more examples.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from kronsearch.errors import SpecError
from kronsearch.sekron.shapes import holds_groups
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["Geometry", "Stage", "count_macs", "dense_macs", "plan_stages", "stage_outputs"]


@dataclass(frozen=True)
class Geometry:
    """Stride, dilation and padding of a layer: one entry for each spatial axis, none at all for a linear layer.

    Args:
        stride: steps between outputs.
        dilation: steps between the kernel's taps.
        padding: (before, after) on each axis.
        padded_first: whether the padding is added to the input beforehand, as for a padding mode other than zeros.
        groups: of the layer; its kernel has (out channels, in channels / groups, *extent).

    Attributes:
        padding_inside: the zeros that a convolution adds by itself on each axis, before and after.
    """

    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padded_first: bool = False
    groups: int = 1
    padding_inside: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inside = tuple(0 if self.padded_first else before for before, _ in self.padding)
        object.__setattr__(self, "padding_inside", inside)

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
        factors: the indices of the factors that are its weight, more than one where they are merged.
        batch: by how much the stage's batch exceeds the number of examples: C digits to come, F digits done, ranks that
            its factors don't have, and the layer's groups for all stages but the first factor's.
        groups: ranks that its factors and factors to come have, and those done; for the first factor the layer's too.
        group_in: in channels of each group: the C digit, and the ranks that no factor to come has.
        group_out: out channels of each group: the F digit, and the ranks that no factor done has.
        extent: the factors' spatial extent.
        geometry: the stage's own stride, dilation and padding.
    """

    factors: tuple[int, ...]
    batch: int
    groups: int
    group_in: int
    group_out: int
    extent: tuple[int, ...]
    geometry: Geometry

    @cached_property  # asked for at every call of a layer
    def pointwise(self) -> bool:
        """Whether it is a convolution that does the same at every position, and nothing between them."""
        return self._by_positions and all(n == 1 for n in self.geometry.stride) and bool(self.extent)

    @property
    def picks(self) -> bool:
        """Whether it is a convolution of one group that uses some positions each by itself, and passes over others."""
        return self._by_positions and any(n > 1 for n in self.geometry.stride) and self.groups == 1

    @property
    def _by_positions(self) -> bool:
        """Whether no output is of more than one position, or of padding."""
        return all(n == 1 for n in self.extent) and not any(map(sum, self.geometry.padding))

    @cached_property
    def product(self) -> bool:
        """Whether it is one product of matrices: pointwise and of one group."""
        return self.pointwise and self.groups == 1

    def outputs(self, output_size: Sequence[int]) -> int:
        """Return the number of its outputs for one example with this many output positions on each axis."""
        return self.batch * prod(output_size) * self.groups * self.group_out

    def macs(self, output_size: Sequence[int]) -> int:
        """Return the multiply-accumulates for one example with this many output positions on each axis."""
        return self.outputs(output_size) * self.group_in * prod(self.extent)


def plan_stages(spec: SeKronSpec, geometry: Geometry) -> tuple[Stage, ...]:
    """Return the stages of a layer in the order in which they run.

    On each axis the padding belongs to the first stage that has an extent there (it can't be seen by an earlier one),
    the stride to the last one that has (an earlier one must see every position). Where no stage has an extent, both
    belong to the first stage, which then runs on the fewest positions.

    Raises:
        SpecError: the first factor's out channels are not a multiple of the layer's groups.
    """
    if not holds_groups(spec.factor_shapes, geometry.groups):
        raise SpecError(
            f"the first factor of {spec} has {spec.factor_shapes[0][0]} out channels, which a layer of "
            f"{geometry.groups} groups can't divide: its groups are the most significant digit of the out channels"
        )
    done: tuple[int, ...] = ()
    stages = []
    for group in spec.order:
        stages.append(_stage(spec, geometry, done, group))
        done += group
    return tuple(stages)


def _stage(spec: SeKronSpec, geometry: Geometry, done: tuple[int, ...], group: tuple[int, ...]) -> Stage:
    """Return the stage of a group of factors, these others being done."""
    shapes = spec.factor_shapes
    to_come = [k for k in range(spec.sequence_length) if k not in done and k not in group]
    before, own, after = (set(spec.held(those)) for those in (done, group, (*done, *group)))
    in_channels, out_channels = (prod(shapes[k][mode] for k in group) for mode in (1, 0))
    own_groups = geometry.groups if 0 in group else 1

    def size(ranks: Collection[int]) -> int:
        return prod(spec.ranks[i] for i in ranks)

    return Stage(
        factors=group,
        batch=(geometry.groups if 0 in to_come else 1)
        * prod(shapes[k][1] for k in to_come)
        * prod(shapes[k][0] for k in done)
        * size(before - own),
        groups=own_groups * size(before & own & after),
        group_in=in_channels * size((before & own) - after),
        group_out=out_channels // own_groups * size(own - before),
        extent=_extent(spec, group),
        geometry=_stage_geometry(spec, geometry, done, group, to_come),
    )


def _stage_geometry(
    spec: SeKronSpec, geometry: Geometry, done: Sequence[int], group: Sequence[int], to_come: Sequence[int]
) -> Geometry:
    before, own, after = (_extent(spec, factors) for factors in (done, group, to_come))
    behind = _extent(spec, range(group[-1] + 1, spec.sequence_length))
    stride, padding = [], []
    for axis, steps in enumerate(geometry.stride):
        nowhere = not done and own[axis] == after[axis] == 1
        pads = nowhere or own[axis] > 1 == before[axis]
        padding.append(geometry.padding[axis] if pads and not geometry.padded_first else (0, 0))
        stride.append(steps if nowhere or own[axis] > 1 == after[axis] else 1)
    return Geometry(
        stride=tuple(stride),
        # a single tap is no farther from itself; torch has but a slow convolution for one that is dilated
        dilation=tuple(d * n if k > 1 else 1 for d, n, k in zip(geometry.dilation, behind, own, strict=True)),
        padding=tuple(padding),
    )


def _extent(spec: SeKronSpec, factors: Collection[int]) -> tuple[int, ...]:
    """Return the spatial extent of some factors together."""
    return tuple(prod(spec.factor_shapes[k][mode] for k in factors) for mode in range(2, len(spec.factor_shapes[0])))


def stage_outputs(
    stages: Sequence[Stage], geometry: Geometry, input_size: Sequence[int]
) -> Iterator[tuple[Stage, tuple[int, ...]]]:
    """Yield the stages of a layer, each with its number of output positions on each axis.

    Args:
        stages: of the layer.
        geometry: of the layer.
        input_size: the input's extent on each spatial axis; for a linear layer (tokens,), its positions.
    """
    size = tuple(input_size)
    if geometry.padded_first:
        size = tuple(n + sum(pad) for n, pad in zip(size, geometry.padding, strict=True))
    for stage in stages:
        if geometry.stride:
            size = stage.geometry.output_size(size, stage.extent)
        yield stage, size


def count_macs(spec: SeKronSpec, geometry: Geometry, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of a factorised layer for one example, as the spec's run has them.

    What it takes to merge factors is none of an example's, and not counted.

    Args:
        spec: sequence, ranks and run.
        geometry: of the layer.
        input_size: the input's extent on each spatial axis; for a linear layer (tokens,), its positions.
    """
    return sum(stage.macs(size) for stage, size in stage_outputs(plan_stages(spec, geometry), geometry, input_size))


def dense_macs(kernel_shape: Sequence[int], geometry: Geometry, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of the dense layer for one example, its bias not counted."""
    return count_macs(SeKronSpec((tuple(kernel_shape),)), geometry, input_size)
