"""Sequences of factor shapes, against brute force."""

from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.sekron.shapes import Structure, cp_sequence, divisors, factor_pairs, structure_of

KERNELS = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple)


@given(st.integers(1, 3000))
@settings(deadline=None)
def test_divisors_are_all_that_divide(number):
    assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]


@given(KERNELS)
@settings(deadline=None)
def test_pairs_are_all_that_multiply_to_the_kernel(kernel_shape):
    candidates = product(*(range(1, n + 1) for n in kernel_shape))
    firsts = {a for a in candidates if all(n % d == 0 for n, d in zip(kernel_shape, a, strict=True))}
    whole = {kernel_shape, (1,) * len(kernel_shape)}
    pairs = list(factor_pairs(kernel_shape))
    assert {first for first, _ in pairs} == firsts - whole
    assert len(pairs) == len(firsts - whole)
    assert all(tuple(map(prod, zip(*pair, strict=True))) == kernel_shape for pair in pairs)


@pytest.mark.parametrize(
    ("kernel_shape", "count"),
    [((64, 64, 3, 3), 7 * 7 * 2 * 2 - 2), ((64, 3, 7, 7), 7 * 2 * 2 * 2 - 2), ((10, 64), 4 * 7 - 2), ((1, 1), 0)],
)
def test_the_number_of_pairs_is_the_product_of_the_numbers_of_divisors(kernel_shape, count):
    assert len(list(factor_pairs(kernel_shape))) == count


@pytest.mark.parametrize(
    ("kernel_shape", "sequence"),
    [
        ((64, 32, 3, 5), ((64, 1, 1, 1), (1, 1, 3, 5), (1, 32, 1, 1))),
        ((8, 4, 1, 7), ((8, 1, 1, 1), (1, 1, 1, 7), (1, 4, 1, 1))),
        ((8, 4, 3), ((8, 1, 1), (1, 1, 3), (1, 4, 1))),
        ((8, 4, 1, 1), None),
        ((8, 4), None),
    ],
)
def test_cp_has_out_channels_extent_and_in_channels_each_on_its_factor(kernel_shape, sequence):
    assert cp_sequence(kernel_shape) == sequence


@pytest.mark.parametrize(
    ("factor_shapes", "structure"),
    [
        (((16, 16, 3, 3),), Structure.DENSE),
        (((16, 1, 1, 1), (1, 16, 3, 3)), Structure.BOTTLENECK),
        (((1, 16, 3, 3), (16, 1, 1, 1)), Structure.BOTTLENECK),
        (((16, 1, 3, 1), (1, 16, 1, 3)), Structure.SPATIAL),
        (((1, 16, 1, 3), (16, 1, 3, 1)), Structure.SPATIAL),
        (((4, 4, 1, 1), (4, 4, 3, 3)), Structure.MIXING),
        (((16, 4, 1, 1), (1, 4, 3, 3)), Structure.MIXING),
        (((4, 4, 3, 1), (4, 4, 1, 3)), Structure.MIXING),
        (((10, 1), (1, 64)), Structure.BOTTLENECK),
        (((16, 1, 1, 1), (1, 1, 3, 3), (1, 16, 1, 1)), Structure.DEEP),
    ],
)
def test_structure(factor_shapes, structure):
    assert structure_of(factor_shapes) is structure


@given(KERNELS)
@settings(deadline=None)
def test_the_structure_of_a_pair_does_not_depend_on_its_order(kernel_shape):
    for first, second in factor_pairs(kernel_shape):
        assert structure_of((first, second)) is structure_of((second, first))
