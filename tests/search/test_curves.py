from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronsearch.search.candidates import Candidates, at_rank
from kronsearch.search.curves import Group, Ratio, deal, digest, groups_of
from kronsearch.sekron import SeKronSpec

SPATIAL = SeKronSpec(((8, 1, 3, 1), (1, 4, 1, 3)), (1,))
MIRRORED = SeKronSpec(((8, 1, 1, 3), (1, 4, 3, 1)), (1,))
DEEP = SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (1, 1))


def group(known, ranks=(1, 2, 4, 8)):
    found = Group({}, ["a"], {SPATIAL: Counter(ranks)})
    found.known.update({digest(at_rank(SPATIAL, rank)): Ratio(*ratio) for rank, ratio in known.items()})
    return found


def test_between_measured_ranks_time_is_linear_and_grows():
    found = group({1: (0.25, 0.01), 2: (0.5, 0.02), 4: (0.75, 0.04), 8: (1.25, 0.04)})
    ratios, errors = found.ratios(SPATIAL, np.array([1, 2, 3, 4, 6, 8]))
    np.testing.assert_allclose(ratios, [0.25, 0.5, 0.625, 0.75, 1.0, 1.25])
    np.testing.assert_allclose(errors, [0.01, 0.02, 0.03, 0.04, 0.04, 0.04])
    shaky = group({1: (0.5, 0.0), 2: (0.25, 0.0), 4: (0.75, 0.0), 8: (0.75, 0.0)})
    ratios, _ = shaky.ratios(SPATIAL, np.array([1, 2, 8]))
    np.testing.assert_allclose(ratios, [0.375, 0.375, 0.75])


def test_of_a_grid_that_is_not_whole_nothing_is_concluded():
    assert group({1: (0.25, 0.0), 8: (1.0, 0.0)}).ratios(SPATIAL, np.array([1])) is None


@given(st.sets(st.integers(1, 10**4), min_size=1, max_size=9))
def test_the_grid_reaches_from_the_lowest_to_the_highest_rank(ranks):
    unit = SeKronSpec(((10**4, 1), (1, 10**4)), (1,))
    grid = [spec.ranks[0] for spec in Group({}, ["a"], {unit: Counter(ranks)}).grid(unit)]
    assert (grid[0], grid[-1]) == (min(ranks), max(ranks))
    assert grid == sorted(set(grid))
    assert len(grid) <= 4


def test_slower_is_beyond_the_error():
    assert [Ratio(value, 0.05).slower for value in (0.9, 1.04, 1.06)] == [False, False, True]
    assert group({1: (1.06, 0.05)}).is_slower(SPATIAL)


def test_the_other_ranks_of_a_sequence_stay():
    assert at_rank(DEEP, 5) == SeKronSpec(DEEP.factor_shapes, (5, 1))
    assert digest(at_rank(DEEP, 5)) == digest(SeKronSpec(DEEP.factor_shapes, (5, 1))) != digest(DEEP)
    assert -(2**63) <= digest(DEEP) < 2**63


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=30, unique=True))
def test_each_is_dealt_once_into_a_layer_of_its_group(wanted):
    groups = [Group({}, names) for names in (["a"], ["b", "c"], ["d", "e", "f"])]
    lineups = deal((groups[which], at_rank(SPATIAL, rank)) for which, rank in wanted)
    dealt = [(name, of, spec) for lineup in lineups for name, (of, spec) in lineup.items()]
    assert all(name in of.layers for name, of, _ in dealt)
    assert sorted((groups.index(of), spec.ranks[0]) for _, of, spec in dealt) == sorted(wanted)
    most = [-(-sum(own == which for own, _ in wanted) // len(groups[which].layers)) for which in range(3)]
    assert len(lineups) == max(most)


def candidates(name, rows):
    """Return candidates of sequence and rank; entry 0 is the dense layer."""
    sequence, rank = np.array([(2, 0), *rows]).T
    ones = np.ones(len(rank), dtype=np.int64)
    dense = SeKronSpec(((8, 4, 3, 3),))
    return Candidates(name, (8, 4, 3, 3), (SPATIAL, DEEP, dense), sequence, rank, ones, ones, np.zeros(len(rank)))


class Cost:
    def layer(self, name):
        class Layer:
            geometry = "stride 2" if name == "c" else "stride 1"
            calls = ((8, 8),)

        return Layer


def test_layers_that_are_alike_share_what_is_measured():
    layers = [candidates(name, [(0, 1), (0, 3), (1, 2)] if name == "a" else [(0, 3), (1, 5)]) for name in "abc"]
    first, second = groups_of(layers, Cost())
    assert (first.layers, second.layers) == (["a", "b"], ["c"])
    assert first.key != second.key
    assert first.ranks == {SPATIAL: {1: 1, 3: 2}, DEEP: {2: 1, 5: 1}}
    assert first.common() == [SPATIAL, DEEP]
    assert first.lowest(DEEP) == at_rank(DEEP, 2)
    assert MIRRORED not in first.ranks


def test_an_unknown_sequence_can_not_be_judged():
    with pytest.raises(KeyError, match=str(digest(SPATIAL))):
        Group({}, ["a"], {SPATIAL: Counter([1])}).is_slower(SPATIAL)
