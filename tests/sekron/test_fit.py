"""The joint fit: it finds what the recursion can't, its objective never rises, and its terms don't cancel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.sekron.contraction import contract
from kronsearch.sekron.fit import begin, fit, grow, largest_terms, solve, sweep
from kronsearch.sekron.svd import recursive_svd
from kronsearch.sekron.tensors import balance, leaves


def tree_matrices(sizes, ranks, generator):
    """Draw factor matrices (R_1…R_min(k, S-1), n_k)."""
    terms, matrices = 1, []
    for k, n in enumerate(sizes):
        terms *= ranks[k] if k < len(ranks) else 1
        matrices.append(torch.randn(terms, n, generator=generator, dtype=torch.float64))
    return matrices


def squared_error(tensor, matrices, ranks, naive_outer):
    return float(np.square(tensor.numpy() - naive_outer(matrices, ranks)).sum() / np.square(tensor.numpy()).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [(3, 1), (3, 2)])
def test_tensors_of_tree_ranks_are_found(ranks, seed, naive_outer):
    tensor = contract(tree_matrices((8, 9, 10), ranks, torch.Generator().manual_seed(seed)), ranks)
    recursion = squared_error(tensor, recursive_svd(tensor, ranks), ranks, naive_outer) ** 0.5
    assert recursion > 0.05
    # the default stops where progress is slow, as on one of these twelve: a "swamp" of alternating least squares
    matrices, error = fit(tensor, ranks, sweeps=1000, tolerance=1e-5)
    assert error**0.5 <= 1e-5
    assert squared_error(tensor, matrices, ranks, naive_outer) ** 0.5 <= 1e-5


def squared_norms(matrices, ranks, naive_outer):
    """Sum the squared norms of all terms, by the sum of outer products of squared entries."""
    return float(naive_outer([matrix.square() for matrix in matrices], ranks).sum())


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    seed=st.integers(0, 2**16),
    weight=st.sampled_from([0.0, 0.01, 1.0]),
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(deadline=None, max_examples=60)
def test_the_objective_never_rises_between_sweeps(sizes, seed, weight, data, dtype, naive_outer):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    ranks = [data.draw(st.integers(1, 3)) for _ in sizes[1:]]
    arrays = [matrix.numpy() for matrix in balance(begin(tensor, ranks), ranks)]
    energy = float(tensor.square().sum())
    rounding = 100 * torch.finfo(dtype).eps  # of the energy, from which the claimed error is a difference
    last = None
    for _ in range(15):
        squared, norms = sweep(tensor.numpy(), energy, arrays, ranks, weight)
        matrices = [torch.from_numpy(array) for array in arrays]
        assert {matrix.dtype for matrix in matrices} == {dtype}
        now = float((tensor - contract(matrices, ranks)).square().sum())
        assert squared == pytest.approx(now, abs=rounding * energy)
        assert norms == pytest.approx(squared_norms(matrices, ranks, naive_outer), rel=1e-3, abs=rounding * energy)
        objective = now + weight * norms
        assert last is None or objective <= last + rounding * energy * (1 + norms / energy)
        last = objective


def test_terms_that_would_cancel_are_restrained(naive_outer):
    """A tensor of rank 3 and border rank 2, which two ever larger terms come ever nearer to."""
    a, b = torch.eye(2, dtype=torch.float64)
    outer = [torch.einsum("i,j,k->ijk", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a))]
    tensor = outer[0] + outer[1] + outer[2]
    matrices, error = fit(tensor, (2, 1), sweeps=2000, tolerance=0.0)
    assert error < 0.35
    assert squared_norms(matrices, (2, 1), naive_outer) < 10 * float(tensor.square().sum())


@pytest.mark.parametrize(("sizes", "ranks"), [((5, 6, 7), (4, 1)), ((5, 6, 7), (2, 3)), ((3, 4, 5, 3), (2, 2, 2))])
def test_a_fit_is_better_than_the_recursion_and_balanced(sizes, ranks, generator, naive_outer):
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    matrices, error = fit(tensor, ranks)
    assert error == pytest.approx(squared_error(tensor, matrices, ranks, naive_outer), rel=1e-9)
    assert error < 0.98 * squared_error(tensor, recursive_svd(tensor, ranks), ranks, naive_outer)
    for found, expected in zip(matrices, balance(matrices, ranks), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("sizes", "ranks"), [((4, 5, 6), (3, 1)), ((4, 5, 6), (2, 2)), ((3, 2, 4, 3), (2, 1, 2))])
def test_a_converged_fit_has_no_gradient(sizes, ranks, generator):
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    matrices, error = fit(tensor, ranks, sweeps=3000, tolerance=0.0)
    matrices = [m.requires_grad_() for m in matrices]
    norms = torch.stack([row.norm(dim=1) for row in leaves(matrices, ranks)]).prod(0).square().sum()
    loss = (tensor - contract(matrices, ranks)).square().sum() + 0.03 * error * norms
    gradients = torch.autograd.grad(loss, matrices)
    assert max(float(g.norm()) for g in gradients) < 1e-3 * float(tensor.norm())


def test_one_sweep_solves_each_factor_as_least_squares_does(generator, naive_outer):
    """With the other factors fixed, numpy's lstsq on the explicit design matrix can't do better."""
    sizes, ranks = (3, 4, 5), (2, 2)
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    matrices = tree_matrices(sizes, ranks, generator)
    by_hand = [m.clone() for m in matrices]
    arrays = [matrix.numpy() for matrix in matrices]
    sweep(tensor.numpy(), float(tensor.square().sum()), arrays, ranks, 0.0)
    matrices = [torch.from_numpy(array) for array in arrays]
    for k in range(3):
        design = []
        for entry in range(by_hand[k].numel()):
            unit = torch.zeros(by_hand[k].numel(), dtype=torch.float64)
            unit[entry] = 1
            with_unit = [*by_hand[:k], unit.reshape(by_hand[k].shape), *by_hand[k + 1 :]]
            design.append(naive_outer(with_unit, ranks).ravel())
        best = np.linalg.lstsq(np.stack(design, 1), tensor.numpy().ravel(), rcond=None)[0]
        by_hand[k] = torch.from_numpy(best).reshape(by_hand[k].shape)
    for found, expected in zip(matrices, by_hand, strict=True):  # apart by the proximal term
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_tensor_of_zeros_is_fitted_by_zeros():
    matrices, error = fit(torch.zeros(3, 4, 5), (2, 1))
    assert error == 0
    assert not contract(matrices, (2, 1)).any()


def test_more_terms_than_the_tensor_needs_are_exact(generator):
    tensor = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    matrices, error = fit(tensor, (12, 1))
    assert [len(m) for m in matrices] == [12, 12, 12]
    assert error < 1e-12
    assert all(bool(m.isfinite().all()) for m in matrices)


def test_factors_of_extent_one_are_fitted(generator):
    tensor = torch.randn(1, 6, 1, 5, generator=generator, dtype=torch.float64)
    assert fit(tensor, (1, 3, 1))[1] == pytest.approx(
        float((torch.linalg.svdvals(tensor[0, :, 0])[3:] ** 2).sum() / tensor.square().sum()), rel=1e-3
    )


def test_the_largest_terms_come_first(generator):
    tensor = contract(tree_matrices((6, 7, 8), (4, 1), generator), (4, 1))
    norms = [float(contract([m[[r]] for m in largest_terms(tensor, 4)], (1, 1)).norm()) for r in range(4)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0


def test_growing_adds_terms_and_keeps_the_others(generator):
    tensor = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    matrices, error = fit(tensor, (2, 1))
    grown = grow(tensor, matrices, 5)
    assert all(torch.equal(g[:2], m) for g, m in zip(grown, matrices, strict=True))
    assert [len(g) for g in grown] == [5, 5, 5]
    assert fit(tensor, (5, 1), start=grown)[1] < error


def test_a_start_is_not_changed(generator):
    tensor = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    start = tree_matrices((4, 5, 6), (2, 1), generator)
    copies = [m.clone() for m in start]
    fit(tensor, (2, 1), start=start, sweeps=3)
    assert all(map(torch.equal, start, copies))


def test_a_system_that_can_not_be_solved_keeps_the_factor():
    previous = np.ones((2, 3))
    assert solve(np.full((2, 2), np.nan), np.zeros(2), previous, previous) is previous


def test_a_singular_system_is_solved_near_the_factor_before():
    found = solve(np.ones((2, 2)), np.zeros(2), np.full((2, 1), 10.0), np.array([[3.0], [1.0]]))
    np.testing.assert_allclose(found, [[6.0], [4.0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((9, 16, 16), (14, 2)), ((4, 8, 9), (6, 2)), ((4, 8, 9), (9, 2)), ((4, 6, 5, 3), (7, 2, 1))]
)
def test_blocks_beyond_those_of_the_recursion_are_of_use(sizes, ranks):
    """The recursive SVD fills blocks up with zeros, and no sweep would move them."""
    tensor = torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = begin(tensor, ranks)
    assert [len(matrix) for matrix in start] == [len(matrix) for matrix in recursive_svd(tensor, ranks)]
    assert all(bool((row.norm(dim=1) > 0).all()) for row in start)
    filled = recursive_svd(tensor, ranks)
    assert bool((filled[-1].norm(dim=1) == 0).any())
    assert fit(tensor, ranks)[1] < 0.6 * fit(tensor, ranks, start=filled)[1]


def test_no_more_blocks_than_the_recursion_has_are_its_own():
    tensor = torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ranks in ((3, 2), (4, 2)):
        assert all(map(torch.equal, begin(tensor, ranks), recursive_svd(tensor, ranks)))
