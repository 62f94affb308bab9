"""Where the digits of the data and of the factors lie while a layer runs, so that few have to be moved. Ints only.

A stage takes data as (batch, channels, *positions), its channels being `groups · group_in`. They start as the digits
of the in channels, the most significant first, and end as those of the out channels; in between they are where the last
stage left them. A factor's digits are then put into the data's order, for factors are small. A pointwise stage can have
batch digits behind its channels too: it doesn't care which positions it sees, so that they are positions.

Where channels are the last dimension in memory, digits behind a stage's channels would tear them apart; all others go
in front of them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from kronsearch.sekron.execution import Geometry, Stage
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["Layout", "Move", "View", "plan_layout"]

Digit = tuple[str, int]  # ("groups", 0), ("rank", i), ("in", factor) or ("out", factor), the first factor of a stage's


class Move(NamedTuple):
    """Digits that are there, by their sizes, and the order in which to put them."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def still(self) -> bool:
        """Whether they are in that order."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True)
class View:
    """How a stage sees its data and its weight.

    Args:
        data: the digits between examples and positions, put in front of the channels, into them, or behind them.
        front: by how much the batch exceeds the number of examples, then.
        back: by how much the digits behind the channels multiply the positions.
        weight: the digits of the factors, as those of `(groups · group_out, group_in)`.
        ready: whether the stage before leaves the data as this one takes them, their shape included.
    """

    data: Move
    front: int
    back: int
    weight: Move
    ready: bool


@dataclass(frozen=True)
class Layout:
    """The views of all stages, how the digits of the out channels are put into place, and if they are there."""

    views: tuple[View, ...]
    outputs: Move
    ready: bool

    @property
    def moves(self) -> int:
        """How often digits have to change places."""
        return sum(not move.still for move in (*(view.data for view in self.views), self.outputs))


def plan_layout(
    spec: SeKronSpec, geometry: Geometry, stages: Sequence[Stage], *, channels_last: bool = False
) -> Layout:
    """Return the layout of a layer's stages. Digits of one value are left out.

    Args:
        spec: of the layer.
        geometry: of the layer.
        stages: of the layer.
        channels_last: whether the channels are the last dimension in memory, and other digits go in front of a stage's.
    """
    sizes = _sizes(spec, geometry, stages)

    def wide(digits: Sequence[Digit]) -> list[Digit]:
        return [digit for digit in digits if sizes[digit] > 1]

    def move(digits: Sequence[Digit], order: Sequence[Digit]) -> Move:
        return Move(tuple(sizes[digit] for digit in digits), tuple(digits.index(digit) for digit in order))

    firsts = sorted(stage.factors[0] for stage in stages)
    data = wide([("groups", 0), *(("in", k) for k in firsts)])
    views, done, ready = list[View](), set[int](), True
    for stage in stages:
        first = stage.factors[0]
        done.update(stage.factors)
        still = [("groups", 0), *(("rank", i) for i in spec.held(done))]
        ranks = wide([("rank", i) for i in spec.held(stage.factors)])
        own = [*ranks, *wide([("groups", 0)] if first == 0 else []), *wide([("out", first), ("in", first)])]
        met = [digit for digit in data if digit in own]
        split, summed = [d for d in met if d in still], [d for d in met if d not in still]
        front, back = _around(stage, data, split + summed, channels_last)
        made = [rank for rank in ranks if rank not in met]
        out = wide([("out", first)])
        # new ranks go beside the in channels that they will be summed with
        made = out + made if channels_last or any(kind == "in" for kind, _ in back) else made + out
        here = move(data, front + split + summed + back)
        alone = not front and not back
        views.append(
            View(
                data=here,
                front=prod(sizes[digit] for digit in front),
                back=prod(sizes[digit] for digit in back),
                weight=move(own, split + made + summed),
                ready=ready and alone and here.still,
            )
        )
        data, ready = front + split + made + back, alone
    outputs = move(data, wide([("groups", 0), *(("out", k) for k in firsts)]))
    return Layout(tuple(views), outputs, ready and outputs.still)


def _sizes(spec: SeKronSpec, geometry: Geometry, stages: Sequence[Stage]) -> dict[Digit, int]:
    sizes: dict[Digit, int] = {("groups", 0): geometry.groups}
    sizes |= {("rank", i): rank for i, rank in enumerate(spec.ranks)}
    for stage in stages:
        first = stage.factors[0]
        out_channels, in_channels = (prod(spec.factor_shapes[k][mode] for k in stage.factors) for mode in (0, 1))
        sizes["out", first] = out_channels // (geometry.groups if first == 0 else 1)
        sizes["in", first] = in_channels
    return sizes


def _around(
    stage: Stage, data: list[Digit], channels: list[Digit], channels_last: bool
) -> tuple[list[Digit], list[Digit]]:
    """Return the batch digits that go in front of a stage's channels, and those that go behind."""
    batch = [digit for digit in data if digit not in channels]
    if channels_last or not stage.pointwise:
        return batch, []
    start = data.index(channels[0]) if channels else len(data)
    if data[start : start + len(channels)] == channels:
        return data[:start], data[start + len(channels) :]
    back = [digit for digit in batch if digit[0] == "out" and digit[1] > stage.factors[0]]  # of less significance
    return [digit for digit in batch if digit not in back], sorted(back)
