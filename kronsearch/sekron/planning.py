"""Which run of a factorised layer costs the fewest MACs: the order of its factors, and what to merge. Ints only.

Parameters and kernel are the same whatever the run, but costs can differ by orders of magnitude: a factor with more out
than in channels had better run late, one with a stride early, and factors whose common rank is wider than what it
couples are cheaper as one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, pairwise, permutations
from math import inf, prod

from kronsearch.sekron.execution import Geometry, plan_stages, stage_outputs
from kronsearch.sekron.spec import Run, SeKronSpec

__all__ = ["plan_run"]

_LARGEST = 16


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
