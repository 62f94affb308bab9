import pytest
import torch

from kronsearch.errors import SpecError
from kronsearch.sekron import SeKronSpec, decompose, reconstruct, relative_error
from kronsearch.sekron.chain import balance_chain, chain_squares, fit_chain
from kronsearch.sekron.contraction import contract


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_chain(sizes, ranks, seed=0):
    edges = (1, *ranks, 1)
    return [draw(edges[k] * edges[k + 1], n, seed=seed + k) for k, n in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((5, 4, 6), (3, 2)), ((4, 2, 3, 5), (2, 3, 4)), ((6, 5), (3,)), ((7,), ())]
)
def test_contraction_is_the_sum_over_neighbouring_ranks(sizes, ranks, naive_outer):
    matrices = draw_chain(sizes, ranks)
    expected = naive_outer(matrices, ranks, "chain")
    torch.testing.assert_close(contract(matrices, ranks), torch.from_numpy(expected))


@pytest.mark.parametrize(("sizes", "ranks"), [((5, 4, 6), (3, 2)), ((4, 2, 3, 5), (2, 3, 4)), ((8, 3, 8), (8, 8))])
@pytest.mark.parametrize("refine", [False, True])
def test_chains_are_found_again(sizes, ranks, refine):
    tensor = contract(draw_chain(sizes, ranks), ranks)
    matrices, error = fit_chain(tensor, ranks, refine=refine)
    assert error < 1e-25
    torch.testing.assert_close(contract(matrices, ranks), tensor)


@pytest.mark.parametrize("sizes", [(5, 4, 6), (3, 7, 2), (9, 2, 3)])
def test_squares_are_those_of_truncated_svds_at_all_ranks(sizes):
    tensor = draw(*sizes)
    squares = chain_squares(tensor)
    assert squares.shape == (min(sizes[0], sizes[1] * sizes[2]), min(sizes[0] * sizes[1], sizes[2]))
    for first in range(1, squares.shape[0] + 1):
        for second in range(1, squares.shape[1] + 1):
            matrices, _ = fit_chain(tensor, (first, second), refine=False)
            left = (tensor - contract(matrices, (first, second))).square().sum()
            torch.testing.assert_close(squares[first - 1, second - 1], left, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("sizes", "ranks"), [((5, 4, 6), (2, 3)), ((4, 2, 3, 5), (2, 2, 3)), ((16, 9, 16), (6, 6))])
def test_fits_are_below_truncated_svds_and_stationary(sizes, ranks):
    tensor = draw(*sizes)
    _, truncated = fit_chain(tensor, ranks, refine=False)
    matrices, error = fit_chain(tensor, ranks)
    assert error < truncated
    leaves = [matrix.requires_grad_() for matrix in balance_chain(matrices, ranks)]
    loss = (tensor - contract(leaves, ranks)).square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    assert max(float(gradient.norm()) for gradient in gradients) < 1e-2 * float(tensor.norm())


def test_tucker_2_is_that_of_higher_order_orthogonal_iteration():
    """A chain on three modes, against HOOI written out with eigenvectors."""
    tensor, ranks = draw(7, 4, 6), (3, 2)
    right = torch.linalg.svd(tensor.flatten(0, 1), full_matrices=False).Vh[: ranks[1]]
    for _ in range(500):
        left = torch.linalg.svd((tensor @ right.T).flatten(1), full_matrices=False).U[:, : ranks[0]]
        core = torch.einsum("fkc,fr->rkc", tensor, left)
        right = torch.linalg.svd(core.flatten(0, 1), full_matrices=False).Vh[: ranks[1]]
    expected = 1 - float((core @ right.T).square().sum() / tensor.square().sum())
    assert fit_chain(tensor, ranks)[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("sizes", "ranks"), [((5, 4, 6), (3, 2)), ((4, 2, 3, 5), (2, 3, 4)), ((3, 1, 3), (3, 3))])
def test_balanced_chains_are_the_same_tensor_with_equal_norms(sizes, ranks):
    matrices = draw_chain(sizes, ranks)
    matrices[0] *= 1e6
    balanced = balance_chain(matrices, ranks)
    torch.testing.assert_close(contract(balanced, ranks), contract(matrices, ranks))
    norms = [float(matrix.norm()) for matrix in balanced]
    assert max(norms) == pytest.approx(min(norms))
    # each side of a bond carries the square root of its singular values, up to the factors' common scales
    left = balanced[0].T @ balanced[0] if len(balanced[0]) == 1 else balanced[0] @ balanced[0].T
    torch.testing.assert_close(left, torch.diag(left.diagonal()), atol=1e-6 * float(left.abs().max()), rtol=0)


def test_a_tensor_of_zeros_and_ranks_beyond_a_core_are_no_trouble():
    matrices, error = fit_chain(torch.zeros(3, 2, 3, dtype=torch.float64), (2, 2))
    assert error == 0
    balanced = [matrix.requires_grad_() for matrix in balance_chain(matrices, (2, 2))]
    assert all(bool(matrix.isfinite().all()) for matrix in balanced)
    towards = torch.autograd.grad((contract(balanced, (2, 2)) - draw(3, 2, 3)).square().sum(), balanced)
    assert max(float(gradient.norm()) for gradient in towards) > 0.1  # it can be trained
    tensor = draw(8, 2, 8)
    matrices, error = fit_chain(tensor, (7, 2))  # a middle core of 2 × 2 entries to each of 7 ranks has but 4 columns
    assert [tuple(matrix.shape) for matrix in matrices] == [(7, 8), (14, 2), (2, 8)]
    torch.testing.assert_close(contract(balance_chain(matrices, (7, 2)), (7, 2)), contract(matrices, (7, 2)))


@pytest.mark.parametrize("refine", [None, True, False])
def test_decompose_and_reconstruct_chains(refine):
    kernel = draw(8, 6, 3, 3)
    shapes = ((4, 1, 1, 3), (1, 6, 3, 1), (2, 1, 1, 1))
    spec = SeKronSpec(shapes, (12, 2), "chain")
    factors = decompose(kernel, spec, refine=refine)
    assert [tuple(factor.shape) for factor in factors] == [(12, 4, 1, 1, 3), (12, 2, 1, 6, 3, 1), (2, 2, 1, 1, 1)]
    assert relative_error(kernel, factors, spec) < 1e-12
    smaller = SeKronSpec(shapes, (3, 2), "chain")
    found = decompose(kernel, smaller, refine=refine)
    assert 0.1 < relative_error(kernel, found, smaller) < 1
    assert reconstruct(found, smaller).shape == kernel.shape


@pytest.mark.parametrize(
    ("shapes", "ranks"),
    [(((2, 1, 3), (1, 2, 1), (2, 2, 1)), (3, 2)), (((2, 3), (1, 2), (3, 1), (2, 2)), (2, 3, 2))],
    ids=str,
)
def test_reconstruct_is_the_definition(shapes, ranks, random_factors, naive_kernel, indexed_kernel):
    spec = SeKronSpec(shapes, ranks, "chain")
    factors = random_factors(spec)
    expected = torch.from_numpy(naive_kernel(factors, shapes, ranks, "chain"))
    torch.testing.assert_close(reconstruct(factors, spec), expected)
    torch.testing.assert_close(indexed_kernel(factors, shapes, ranks, "chain"), expected)


def test_ranks_of_chains_are_bounded_and_two_factors_are_a_tree():
    with pytest.raises(SpecError, match=r"rank 7 of .* is above 6"):
        SeKronSpec(((8, 1), (1, 3), (1, 2)), (7, 2), "chain")
    with pytest.raises(SpecError, match=r"rank 3 of .* is above 2"):
        SeKronSpec(((8, 1), (1, 3), (1, 2)), (6, 3), "chain")
    with pytest.raises(SpecError, match='a coupling is "tree" or "chain", not '):
        SeKronSpec(((8, 1), (1, 3)), (1,), "ring")
    assert SeKronSpec(((8, 1), (1, 3)), (1,), "chain") == SeKronSpec(((8, 1), (1, 3)), (1,))
    spec = SeKronSpec(((8, 1, 1), (1, 1, 3), (1, 6, 1)), (5, 4), "chain")
    assert spec.params == 5 * 8 + 20 * 3 + 4 * 6
    assert str(spec) == "8·1·1 ⊗ 1·1·3 ⊗ 1·6·1, R 5,4 chain"
