"""Which run of a factorised layer costs least: the order of its factors, and what to merge. Ints only.

Parameters and kernel are the same whatever the run, but costs can differ by orders of magnitude: a factor with more out
than in channels had better run late, one with a stride early, and factors whose common rank is wider than what it
couples are cheaper as one. What a training step takes is another question, see `plan_training`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, pairwise, permutations
from math import inf, prod
from typing import NamedTuple

from kronsearch.sekron.execution import Geometry, Stage, plan_stages, stage_outputs
from kronsearch.sekron.spec import Run, SeKronSpec, all_merged

__all__ = ["StepPrices", "plan_run", "plan_training", "training_costs"]

_LARGEST = 16
_WORTH = 0.85  # of the time with the kernel formed: what stages are expected to take to be worth it


def plan_run(
    spec: SeKronSpec, geometry: Geometry, calls: Sequence[Sequence[int]], *, largest: int = _LARGEST
) -> SeKronSpec:
    """Return the spec with the run of fewest MACs for one example, all calls together.

    To merge factors counts as much as it takes at every call, though `count_macs` leaves it out, as it does not grow
    with the number of examples. All orders and mergers are tried: 3, 11, 49, 261 and 1,631 for two to six factors. Of
    equal ones the default run, last to first and nothing merged, is taken, then one of fewer stages.

    Args:
        spec: sequence and ranks; its own run doesn't matter.
        geometry: of the layer.
        calls: the input size of each call, as in `count_macs`.
        largest: how many times the larger of the layer's input and output a result between two stages may have as
            many entries. All factors merged have none, so that there is always a run.

    Raises:
        SpecError: the first factor's out channels are not a multiple of the layer's groups.
    """
    return _plan(replace(spec, run=()), geometry, tuple(map(tuple, calls)), largest)


@lru_cache(maxsize=2**14)  # networks repeat their layers
def _plan(spec: SeKronSpec, geometry: Geometry, calls: tuple[tuple[int, ...], ...], largest: int) -> SeKronSpec:
    best, fewest = spec, inf
    for run in _runs(spec.sequence_length):
        planned = replace(spec, run=run)
        merging = len(calls) * sum(merging_macs(planned, group) for group in planned.run)
        macs = _macs_within(planned, geometry, calls, largest) + merging
        if macs < fewest:
            best, fewest = planned, macs
    return best


class StepPrices(NamedTuple):
    """What it takes a training step to move data and to form kernels, as the MACs of dense convolutions in that time.

    Args:
        lanes: channels that the processor works on at once: fewer take as long.
        entry: for an entry of a convolution's inputs or outputs, there and back.
        depthwise: how many times as much where the convolution has a group for each channel.
        depthwise_slow: the same where it is dilated, or of three axes.
        forming: for a MAC that it takes to merge factors.
    """

    lanes: int
    entry: int
    depthwise: int
    depthwise_slow: int
    forming: int


def plan_training(spec: SeKronSpec, geometry: Geometry, positions: int, prices: StepPrices) -> SeKronSpec:
    """Return the spec with the run that a training step is expected to be fastest in, mostly all factors merged.

    Other runs are taken if all of their stages are convolutions over plain channels, of one group or depthwise, and if
    they take at most 0.85 of the time. That is modelled, as MACs, moved entries and mergers; channels that are summed
    over count in multiples of the processor's lanes. All factors are merged of kernels of fewer in channels than lanes,
    as those for images: there are fast convolutions for these, and no gradients towards images are taken.

    Args:
        spec: sequence and ranks; its own run doesn't matter.
        geometry: of the layer.
        positions: of the layer's outputs in a step, for all examples and calls together.
        prices: of the machine and precision.
    """
    formed, *staged = training_costs(spec, geometry, positions, prices).items()
    if not staged or spec.kernel_shape[1] < prices.lanes:
        return formed[0]
    best, cost = min(staged, key=lambda each: each[1])
    return best if cost < _WORTH * formed[1] else formed[0]


def training_costs(spec: SeKronSpec, geometry: Geometry, positions: int, prices: StepPrices) -> dict[SeKronSpec, float]:
    """Return what a training step is expected to take, as MACs: first with all factors merged, then in plain stages.

    Args are those of `plan_training`.
    """
    merged = all_merged(spec.sequence_length)
    found = {}
    for run in (merged, *_runs(spec.sequence_length)):
        planned = replace(spec, run=run)
        stages = plan_stages(planned, geometry)
        if run == merged or (len(stages) > 1 and all(map(_is_plain, stages))):
            found[planned] = _step_cost(planned, geometry, stages, positions, prices)
    return found


def _is_plain(stage: Stage) -> bool:
    return stage.batch == 1 and (stage.groups == 1 or _is_depthwise(stage))


def _is_depthwise(stage: Stage) -> bool:
    return stage.groups > 1 and stage.group_in == stage.group_out == 1


def _step_cost(
    spec: SeKronSpec, geometry: Geometry, stages: Sequence[Stage], positions: int, prices: StepPrices
) -> float:
    """Return what a training step takes for a layer with so many positions of its outputs, as MACs."""
    input_size = tuple(1024 * step for step in geometry.stride)  # large, so that borders are of no account
    before, cost = prod(input_size), 0
    for stage, size in stage_outputs(stages, geometry, input_size):
        group_in, group_out, price = stage.group_in, stage.group_out, prices.entry
        if stage.groups == 1:
            group_in, group_out = (-(-n // prices.lanes) * prices.lanes for n in (group_in, group_out))
        elif _is_depthwise(stage):
            dilated = any(step > 1 for step in stage.geometry.dilation)
            price *= prices.depthwise_slow if dilated or len(stage.extent) > 2 else prices.depthwise
        after = prod(size)
        cost += after * stage.groups * group_in * group_out * prod(stage.extent)
        cost += price * stage.groups * (before * group_in + after * group_out)
        before = after
    return cost * positions / before + prices.forming * sum(merging_macs(spec, group) for group in spec.order)


def merging_macs(spec: SeKronSpec, group: Sequence[int]) -> int:
    """Return the multiply-accumulates of merging neighbouring factors into one, from the last of them to the first."""
    total = 0
    for k in group[:-1]:
        merged = range(k + 1, group[-1] + 1)
        ranks = {*spec.held((k,)), *spec.held(merged)}
        total += prod(spec.ranks[i] for i in ranks) * prod(prod(spec.factor_shapes[j]) for j in (k, *merged))
    return total


def _macs_within(spec: SeKronSpec, geometry: Geometry, calls: Sequence[Sequence[int]], largest: int) -> float:
    """Return the MACs of all calls together, infinitely many where a result between two stages is too large."""
    stages, macs = plan_stages(spec, geometry), 0
    for call in calls:
        steps = list(stage_outputs(stages, geometry, call))
        results = [stage.outputs(size) for stage, size in steps]
        bound = largest * max(geometry.groups * spec.kernel_shape[1] * prod(call), results[-1])
        if any(entries > bound for entries in results[:-1]):
            return inf
        macs += sum(stage.macs(size) for stage, size in steps)
    return macs


def _runs(length: int) -> Iterator[Run]:
    """Yield all runs of this many factors: the default one, then those of ever more stages."""
    yield ()
    for cuts in range(length):
        for places in combinations(range(1, length), cuts):
            groups = [tuple(range(a, b)) for a, b in pairwise((0, *places, length))]
            yield from permutations(reversed(groups))
