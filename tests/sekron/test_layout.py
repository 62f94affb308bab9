"""Where digits lie: what has to be moved, and that common structures run on views alone."""

import pytest

from kronsearch.sekron import Geometry, SeKronSpec
from kronsearch.sekron.execution import plan_stages
from kronsearch.sekron.layout import plan_layout

F, C = 16, 12
SAME = Geometry((1, 1), (1, 1), ((1, 1), (1, 1)))


def layout_of(spec, geometry=SAME):
    return plan_layout(spec, geometry, plan_stages(spec, geometry))


def moves(spec, geometry=SAME):
    """Count how often data move."""
    return layout_of(spec, geometry).moves


@pytest.mark.parametrize(
    "spec",
    [
        SeKronSpec(((F, C, 3, 3),)),
        SeKronSpec(((F, 1, 3, 1), (1, C, 1, 3)), (5,)),
        SeKronSpec(((F, 1, 3, 3), (1, C, 1, 1)), (5,)),
        SeKronSpec(((F, 1, 1, 1), (1, C, 3, 3)), (5,)),
        SeKronSpec(((1, C, 1, 1), (F, 1, 3, 3)), (5,), run=((0,), (1,))),
        SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 1)),
        SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 2)),
        SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 2), "chain"),
        SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 2), run=((1, 2), (0,))),
        SeKronSpec(((2, 2, 1, 1), (8, 6, 3, 3)), (4,)),
        SeKronSpec(((2, 2, 1, 1), (8, 6, 3, 3)), (4,), run=((0,), (1,))),
    ],
    ids=str,
)
def test_nothing_moves(spec):
    assert moves(spec) == 0


@pytest.mark.parametrize("run", [(), ((0,), (1,)), ((0, 1),)])
def test_a_pointwise_layer_moves_nothing_unless_it_has_a_stride(run):
    spec = SeKronSpec(((4, 2, 1, 1), (4, 6, 1, 1)), (4,), run=run)
    assert moves(spec, Geometry((1, 1), (1, 1), ((0, 0), (0, 0)))) == 0
    assert moves(spec, Geometry((2, 2), (1, 1), ((0, 0), (0, 0)))) == (2 if run == ((0,), (1,)) else 0)


def test_a_pair_whose_last_stage_has_an_extent_moves_before_and_after_it():
    assert moves(SeKronSpec(((8, 6, 3, 1), (2, 2, 1, 3)), (4,))) == 2


def test_a_linear_pair_moves_before_the_last_stage_and_after_it():
    assert moves(SeKronSpec(((4, 2), (4, 6)), (4,)), Geometry()) == 2
    assert moves(SeKronSpec(((4, 1), (4, 6)), (4,)), Geometry()) == 2
    assert moves(SeKronSpec(((4, 1), (1, 6)), (4,)), Geometry()) == 0


def test_a_pointwise_stage_takes_done_channels_for_positions():
    """(2, 2, 1, 1)(8, 6, 3, 3): the second factor leaves (C_1, R, F_2), the first sums over C_1 and R."""
    first, second = layout_of(SeKronSpec(((2, 2, 1, 1), (8, 6, 3, 3)), (4,))).views
    assert (first.data.sizes, first.data.order, first.front, first.back) == ((2, 6), (0, 1), 2, 1)
    assert (first.weight.sizes, first.weight.order) == ((4, 8, 6), (0, 1, 2))  # R, F_2, C_2
    assert (second.data.sizes, second.data.order, second.front, second.back) == ((2, 4, 8), (0, 1, 2), 1, 8)
    assert (second.weight.sizes, second.weight.order) == ((4, 2, 2), (1, 2, 0))  # R, F_1, C_1 as (F_1, C_1, R)


def test_the_groups_of_a_layer_stay_in_front():
    geometry = Geometry((1, 1), (1, 1), ((1, 1), (1, 1)), groups=3)
    spec = SeKronSpec(((6, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (5, 1))
    assert moves(spec, geometry) == 0
    *_, last = layout_of(spec, geometry).views
    assert (last.data.sizes, last.weight.sizes, last.weight.order) == ((3, 5), (5, 3, 2), (1, 2, 0))  # R, groups, F_1


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 1)), 0),
        (SeKronSpec(((F, 2, 1, 1), (1, 6, 3, 3)), (4,)), 0),
        (SeKronSpec(((2, 1, 1, 1), (8, C, 3, 3)), (2,)), 1),  # F_2 F_1 to F_1 F_2
        (SeKronSpec(((2, 2, 1, 1), (8, 6, 3, 3)), (4,)), 2),  # and C_1 behind F_2 before
    ],
    ids=str,
)
def test_with_channels_last_other_digits_go_in_front(spec, expected):
    layout = plan_layout(spec, SAME, plan_stages(spec, SAME), channels_last=True)
    assert layout.moves == expected
    assert all(view.back == 1 for view in layout.views)
