"""`SeKronSpec`: what it refuses, and its counts."""

import dataclasses
import pickle
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.errors import SpecError
from kronsearch.sekron import SeKronSpec
from kronsearch.sekron.shapes import Structure

SPATIAL = ((16, 1, 3, 1), (1, 8, 1, 3))
CP = ((16, 1, 1, 1), (1, 1, 3, 3), (1, 8, 1, 1))


def test_counts_of_two_factors():
    spec = SeKronSpec(SPATIAL, (5,))
    assert spec.sequence_length == 2
    assert spec.kernel_shape == (16, 8, 3, 3)
    assert spec.tensor_shapes == ((5, 16, 1, 3, 1), (5, 1, 8, 1, 3))
    assert spec.params == 5 * 16 * 3 + 5 * 8 * 3
    assert spec.structure is Structure.SPATIAL


def test_counts_of_three_factors():
    spec = SeKronSpec(CP, (5, 2))
    assert [spec.rank_shape(k) for k in range(3)] == [(5,), (5, 2), (5, 2)]
    assert spec.params == 5 * 16 + 5 * 2 * 3 * 3 + 5 * 2 * 8


def test_counts_of_four_factors():
    spec = SeKronSpec(((2, 1), (3, 2), (1, 5), (2, 2)), (2, 3, 4))
    assert spec.kernel_shape == (2 * 3 * 2, 2 * 5 * 2)
    assert spec.params == 2 * 2 + 2 * 3 * 6 + 2 * 3 * 4 * 5 + 2 * 3 * 4 * 4


def test_one_factor_is_the_dense_kernel():
    spec = SeKronSpec(((16, 8, 3, 3),))
    assert (spec.ranks, spec.tensor_shapes, spec.params) == ((), ((16, 8, 3, 3),), 16 * 8 * 3 * 3)


def test_whole_numbers_of_other_kinds_become_ints():
    spec = SeKronSpec(np.array([[4, 1], [1, 4]]), np.array([3], dtype=np.int32))
    assert spec == SeKronSpec(((4, 1), (1, 4)), (3,))
    assert {type(n) for n in (*spec.ranks, *spec.factor_shapes[0])} == {int}


def test_lists_become_tuples():
    spec = SeKronSpec([[16, 1], [1, 8]], [3])
    assert spec == SeKronSpec(((16, 1), (1, 8)), (3,))
    assert hash(spec) == hash(SeKronSpec(((16, 1), (1, 8)), (3,)))


@pytest.mark.parametrize(
    ("shapes", "ranks", "message"),
    [
        ((), (), "one entry per mode"),
        (((4,), (2,)), (1,), "two at least"),
        (((4, 1, 3, 3), (1, 4)), (1,), "the same number in each"),
        (((4, 0), (1, 4)), (1,), "positive whole numbers"),
        (((4, -1), (1, 4)), (1,), "positive whole numbers"),
        (((4, 1.0), (1, 4)), (1,), "positive whole numbers"),
        (((4, True), (1, 4)), (1,), "positive whole numbers"),
        (((4, 1), (1, 4)), (0,), "positive whole numbers"),
        (((4, 1), (1, 4)), (2.0,), "positive whole numbers"),
        (((4, 1), (1, 4)), (), r"2 factors take 1 ranks, got 0: \(\)"),
        (((1, 1),) * 17, (1,) * 16, "a sequence has at most 16 factors"),
        (((1,) * 17, (1,) * 17), (1,), "at most 16 factors, of a kernel with as many modes"),
        (((4, 1), (1, 4)), (1,) * 10**5, "at most 16 factors"),
        (((4, 2**31), (1, 4)), (1,), "positive whole numbers below 2147483648$"),
        (((4, 1), (1, 4)), (-(10**5000),), "positive whole numbers below 2147483648$"),
        (((4, 4),), (1,), r"1 factors take 0 ranks, got 1: \(1,\)"),
        (((4, 1), (1, 4)), (2, 2), "2 factors take 1 ranks, got 2"),
        (((4, 1), (1, 6)), (5,), r"rank 5 of .* is above 4, where the sum is exact already"),
        (((2, 1), (1, 2), (2, 1)), (3, 3), r"more terms than the kernel of .* has entries \(8\)"),
    ],
)
def test_refused(shapes, ranks, message):
    with pytest.raises(SpecError, match=message) as caught:
        SeKronSpec(shapes, ranks)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_highest_rank_of_two_factors_is_allowed():
    assert SeKronSpec(((4, 1), (1, 6)), (4,)).ranks == (4,)


def test_a_kernel_of_another_shape_is_refused():
    spec = SeKronSpec(SPATIAL, (2,))
    spec.check_kernel([16, 8, 3, 3])
    with pytest.raises(SpecError, match=r"multiply to \(16, 8, 3, 3\), not to the kernel's shape \(8, 16, 3, 3\)"):
        spec.check_kernel((8, 16, 3, 3))


@pytest.mark.parametrize(
    "run",
    [
        ((0,), (1,)),
        ((0, 1),),
        ((0,), (1,), (2,), (3,)),
        ((0,), (0,), (1,), (2,)),
        ((0,), (1,), (-1,)),
        ((0, 2), (1,)),
        ((1, 0), (2,)),
        ((0, 1, 2), ()),
        ((0,), (True,), (2,)),
        ((0,), (1.0,), (2,)),
        ((0,), ("1",), (2,)),
    ],
)
def test_runs_of_other_factors_are_refused(run):
    with pytest.raises(SpecError, match="a run of 3 factors names each of 0 … 2 once, in groups of neigh") as caught:
        SeKronSpec(CP, (5, 2), run=run)
    assert "\n" not in str(caught.value)


def test_the_default_run_goes_without_saying():
    spec = SeKronSpec(CP, (5, 2), run=[[2], [1], [0]])
    assert spec == SeKronSpec(CP, (5, 2))
    assert hash(spec) == hash(SeKronSpec(CP, (5, 2)))
    assert (spec.run, spec.order) == ((), ((2,), (1,), (0,)))
    other = SeKronSpec(CP, (5, 2), run=[[1, 2], [0]])
    assert other != spec
    assert other.run == other.order == ((1, 2), (0,))
    assert (other.params, other.tensor_shapes) == (spec.params, spec.tensor_shapes)
    assert dataclasses.replace(other, ranks=(4, 1)).run == other.run


def test_ranks_that_merged_factors_share_with_others():
    shapes = ((2, 2), (3, 1), (1, 2), (2, 2))
    tree, chain = SeKronSpec(shapes, (2, 3, 4)), SeKronSpec(shapes, (2, 3, 4), "chain")
    for spec in (tree, chain):
        for k in range(4):
            assert tuple(spec.ranks[i] for i in spec.held((k,))) == spec.rank_shape(k)
        assert spec.held(()) == spec.held(range(4)) == ()
    assert [tree.held(group) for group in ((0, 1), (1, 2), (2, 3), (1, 2, 3))] == [(0, 1), (0, 1, 2), (0, 1), (0,)]
    assert [chain.held(group) for group in ((0, 1), (1, 2), (2, 3), (1, 2, 3))] == [(1,), (0, 2), (1,), (0,)]
    assert tree.merged_params((1, 2)) == 2 * 3 * 4 * (3 * 1) * (1 * 2)
    assert chain.merged_params((1, 2)) == 2 * 4 * (3 * 1) * (1 * 2)
    wide = SeKronSpec(((1, 1), (1, 1), (8, 8), (8, 8)), (8, 8, 8))
    assert wide.merged_params((0, 1, 2, 3)) == 8 * 8 * (8 * 8) * (8 * 8)  # where the last two are one


def test_written_on_a_short_line():
    assert str(SeKronSpec(CP, (5, 2), run=((0,), (1, 2)))) == "16·1·1·1 ⊗ 1·1·3·3 ⊗ 1·8·1·1, R 5,2, run 0,1+2"
    assert str(SeKronSpec(SPATIAL, (5,))) == "16·1·3·1 ⊗ 1·8·1·3, R 5"
    assert str(SeKronSpec(CP, (5, 2))) == "16·1·1·1 ⊗ 1·1·3·3 ⊗ 1·8·1·1, R 5,2"
    assert str(SeKronSpec(((16, 8),))) == "16·8"


@given(data=st.data())
@settings(deadline=None)
def test_random_specs(data, draw_spec):
    spec = draw_spec(data.draw, modes=data.draw(st.integers(2, 5)))
    assert prod(spec.kernel_shape) == prod(prod(shape) for shape in spec.factor_shapes)
    params, terms = 0, 1
    for k, shape in enumerate(spec.factor_shapes):
        terms *= spec.ranks[k] if k < len(spec.ranks) else 1
        params += terms * prod(shape)
    assert spec.params == params
    assert pickle.loads(pickle.dumps(spec)) == dataclasses.replace(spec) == spec  # noqa: S301  # our own bytes
    with pytest.raises(SpecError, match="ranks, got"):
        dataclasses.replace(spec, ranks=(*spec.ranks, 1))
