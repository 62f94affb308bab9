"""The recursive SVD: its error is exactly the energy that it discards, and full ranks lose nothing."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.sekron.contraction import contract
from kronsearch.sekron.svd import recursive_svd

SEEDS = st.integers(0, 2**16)


def tensors(sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def discarded(array, ranks):
    """Return the energy that one node and all below it drop, by numpy's SVD, one node at a time."""
    if not ranks:
        return 0.0
    _, values, right = np.linalg.svd(array.reshape(len(array), -1), full_matrices=False)
    lost = float((values[ranks[0] :] ** 2).sum())
    for value, row in zip(values[: ranks[0]], right, strict=False):
        lost += discarded(value * row.reshape(array.shape[1:]), ranks[1:])
    return lost


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((6, 9), (4,)), ((9, 6), (1,)), ((5, 6, 7), (3, 2)), ((5, 6, 7), (1, 6)), ((3, 4, 5, 2), (2, 3, 1))],
)
def test_the_error_is_the_discarded_energy(sizes, ranks):
    tensor = tensors(sizes)
    error = float((tensor - contract(recursive_svd(tensor, ranks), ranks)).square().sum())
    lost = discarded(tensor.numpy(), ranks)
    assert lost > 0.01 * float(tensor.square().sum())
    assert error == pytest.approx(lost, rel=1e-10)


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=SEEDS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_error_on_random_tensors(sizes, seed, data):
    tensor = tensors(sizes, seed)
    ranks = [data.draw(st.integers(1, 4)) for _ in sizes[1:]]
    matrices = recursive_svd(tensor, ranks)
    assert [tuple(m.shape) for m in matrices] == [(prod(ranks[: k + 1]), n) for k, n in enumerate(sizes)]
    error = float((tensor - contract(matrices, ranks)).square().sum())
    assert error == pytest.approx(discarded(tensor.numpy(), ranks), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4), (3, 4, 5), (2, 3, 2, 3)])
def test_full_ranks_are_exact(sizes):
    tensor = tensors(sizes)
    ranks = [min(n, prod(sizes[k + 1 :])) for k, n in enumerate(sizes[:-1])]
    torch.testing.assert_close(contract(recursive_svd(tensor, ranks), ranks), tensor, rtol=0, atol=1e-12)


def test_ranks_above_the_full_ones_are_filled_with_zeros():
    tensor = tensors((2, 3, 2))
    ranks = (4, 5)
    matrices = recursive_svd(tensor, ranks)
    assert [tuple(m.shape) for m in matrices] == [(4, 2), (20, 3), (20, 2)]
    assert not matrices[0][2:].any()
    assert not matrices[2].reshape(4, 5, 2)[:, 2:].any()
    torch.testing.assert_close(contract(matrices, ranks), tensor, rtol=0, atol=1e-12)


def test_two_factors_are_optimal():
    tensor = tensors((6, 8))
    best = float(np.sqrt((np.linalg.svd(tensor.numpy(), compute_uv=False)[3:] ** 2).sum()))
    assert float((tensor - contract(recursive_svd(tensor, (3,)), (3,))).norm()) == pytest.approx(best, rel=1e-10)


def test_a_tensor_of_zeros_and_float32():
    assert not contract(recursive_svd(torch.zeros(3, 4, 5), (2, 2)), (2, 2)).any()
    assert {m.dtype for m in recursive_svd(tensors((3, 4)).float(), (2,))} == {torch.float32}
