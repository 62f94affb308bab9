"""Kernels as tensors of factors and back, against loops over indices."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.errors import SpecError
from kronsearch.sekron import SeKronSpec, reconstruct
from kronsearch.sekron.contraction import contract
from kronsearch.sekron.tensors import as_factors, as_matrices, balance, fold_kernel, leaves, unfold_kernel

EXACT = 1e-12  # float64, sums of at most a hundred products of order one
SEEDS = st.integers(0, 2**16)

SPECS = [
    SeKronSpec(((4, 3, 2, 3),)),
    SeKronSpec(((4, 1, 3, 1), (1, 3, 1, 2)), (3,)),
    SeKronSpec(((2, 2, 1, 3), (3, 2, 2, 1)), (4,)),
    SeKronSpec(((2, 1, 1, 3), (1, 2, 3, 1), (3, 2, 1, 1)), (2, 3)),
    SeKronSpec(((2, 1), (1, 3), (2, 2), (1, 2)), (2, 1, 3)),
    SeKronSpec(((2, 3, 2), (2, 1, 2)), (2,)),
]


def nested_kron(factors, ranks):
    """Write the model as the paper does: A¹_{r1} ⊗ (Σ_{r2} A²_{r1 r2} ⊗ …), with numpy's Kronecker product."""
    if not ranks:
        return factors[0]
    inner = [nested_kron([factor[r] for factor in factors[1:]], ranks[1:]) for r in range(ranks[0])]
    return sum(np.kron(factors[0][r], inner[r]) for r in range(ranks[0]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reconstruct_is_the_definition(spec, random_factors, naive_kernel, indexed_kernel):
    factors = random_factors(spec)
    expected = naive_kernel(factors, spec.factor_shapes, spec.ranks, spec.coupling)
    np.testing.assert_allclose(nested_kron([f.numpy() for f in factors], spec.ranks), expected, atol=EXACT)
    np.testing.assert_allclose(
        indexed_kernel(factors, spec.factor_shapes, spec.ranks, spec.coupling), expected, atol=EXACT
    )
    np.testing.assert_allclose(reconstruct(factors, spec), expected, atol=EXACT)


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_reconstruct_on_random_specs(data, seed, draw_spec, random_factors):
    spec = draw_spec(data.draw, modes=data.draw(st.integers(2, 4)))
    factors = random_factors(spec, seed)
    expected = nested_kron([factor.numpy() for factor in factors], spec.ranks)
    np.testing.assert_allclose(reconstruct(factors, spec), expected, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reconstruct_is_differentiable(spec, random_factors, indexed_kernel, generator):
    factors = [factor.requires_grad_() for factor in random_factors(spec)]
    towards = torch.randn(spec.kernel_shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(
        (indexed_kernel(factors, spec.factor_shapes, spec.ranks, spec.coupling) * towards).sum(), factors
    )
    found = torch.autograd.grad((reconstruct(factors, spec) * towards).sum(), factors)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


def test_reconstruct_refuses_factors_of_other_shapes(random_factors):
    spec = SPECS[1]
    factors = random_factors(spec)
    with pytest.raises(SpecError, match=r"have the shapes .*, got"):
        reconstruct([factors[0], factors[1][:2]], spec)
    with pytest.raises(SpecError, match=r"have the shapes .*, got"):
        reconstruct(factors[:1], spec)


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_folding_undoes_unfolding(data, seed, draw_spec):
    spec = draw_spec(data.draw, modes=data.draw(st.integers(2, 5)))
    kernel = torch.randn(spec.kernel_shape, generator=torch.Generator().manual_seed(seed))
    tensor = unfold_kernel(kernel, spec.factor_shapes)
    assert tensor.shape == tuple(map(prod, spec.factor_shapes))
    assert torch.equal(fold_kernel(tensor, spec.factor_shapes), kernel)
    assert torch.equal(unfold_kernel(fold_kernel(tensor, spec.factor_shapes), spec.factor_shapes), tensor)


def test_unfolding_places_every_entry_by_its_digits():
    shapes = ((2, 1, 3), (2, 4, 2), (1, 2, 1))
    kernel = torch.arange(4 * 8 * 6).reshape(4, 8, 6)
    tensor = unfold_kernel(kernel, shapes)
    for f, c, k in np.ndindex(4, 8, 6):
        first = (f // 2) * 3 + k // 2
        second = (f % 2) * 4 * 2 + (c // 2) * 2 + k % 2
        assert tensor[first, second, c % 2] == kernel[f, c, k]


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
def test_contract_sums_outer_products(spec, random_factors, naive_outer):
    matrices = as_matrices(random_factors(spec), spec)
    np.testing.assert_allclose(contract(matrices, spec.ranks), naive_outer(matrices, spec.ranks), atol=EXACT)
    for leaf in leaves(matrices, spec.ranks):
        assert len(leaf) == prod(spec.ranks)


def test_factors_and_matrices_are_views_of_each_other(random_factors):
    spec = SPECS[3]
    factors = random_factors(spec)
    matrices = as_matrices(factors, spec)
    assert [tuple(m.shape) for m in matrices] == [(2, 6), (2 * 3, 6), (2 * 3, 6)]
    assert all(map(torch.equal, as_factors(matrices, spec), factors))


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_balance_keeps_the_tensor(data, seed, draw_spec, random_factors):
    spec = draw_spec(data.draw, length=data.draw(st.integers(2, 4)))
    factors = [10.0 ** (3 * (-1) ** k) * factor for k, factor in enumerate(random_factors(spec, seed))]
    matrices = as_matrices(factors, spec)
    tensor = contract(matrices, spec.ranks)
    balanced = balance(matrices, spec.ranks)
    torch.testing.assert_close(contract(balanced, spec.ranks), tensor, rtol=0, atol=1e-12 * float(tensor.norm()))


@pytest.mark.parametrize("ranks", [(4,), (4, 1), (4, 1, 1)])
def test_balance_equalises_the_norms_of_every_term(ranks, generator):
    matrices = [
        10.0 ** (4 * (-1) ** k) * torch.randn(4, 5 + k, generator=generator, dtype=torch.float64)
        for k in range(len(ranks) + 1)
    ]
    before = torch.stack([m.norm(dim=1) for m in matrices])
    assert float((before.amax(0) / before.amin(0)).min()) > 1e7
    after = torch.stack([m.norm(dim=1) for m in balance(matrices, ranks)])
    torch.testing.assert_close(after, after[:1].expand_as(after), rtol=1e-10, atol=0)


def test_balance_sets_a_shared_factor_against_the_mean_of_its_terms(generator):
    ranks = (2, 3)
    matrices = [
        scale * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        for n, scale in ((2, 1e3), (6, 1.0), (6, 1e-3))
    ]
    first, second, third = balance(matrices, ranks)
    torch.testing.assert_close(second.norm(dim=1), third.norm(dim=1), rtol=1e-10, atol=0)
    below = (second.norm(dim=1) * third.norm(dim=1)).square().reshape(2, 3).mean(1).sqrt()
    torch.testing.assert_close(first.norm(dim=1), below.sqrt(), rtol=1e-10, atol=0)


def test_balance_leaves_terms_of_zeros_finite():
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    some = torch.ones(3, 4, dtype=torch.float64)
    some[1] = 0
    for matrices in ([zeros, zeros, zeros], [some, some, some], [zeros, some, some], [some, some, zeros]):
        balanced = balance(matrices, (3, 1))
        assert all(bool(matrix.isfinite().all()) for matrix in balanced)
        assert torch.equal(contract(balanced, (3, 1)) != 0, contract(matrices, (3, 1)) != 0)


def test_balance_does_not_change_its_input(generator):
    matrices = [torch.randn(2, 3, generator=generator) for _ in range(3)]
    copies = [matrix.clone() for matrix in matrices]
    balance(matrices, (2, 1))
    assert all(map(torch.equal, matrices, copies))
