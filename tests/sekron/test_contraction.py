"""Sums of outer products against loops over indices, their gradients against autograd's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.sekron.contraction import contract, contract_and_pull
from kronsearch.sekron.tensors import as_matrices

SEEDS = st.integers(0, 2**16)
COUPLINGS = ("tree", "chain")


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_outer_products_are_summed(data, seed, draw_spec, random_factors, naive_outer):
    spec = draw_spec(data.draw, modes=3, entries=200, couplings=COUPLINGS)
    matrices = as_matrices(random_factors(spec, seed), spec)
    expected = torch.from_numpy(naive_outer(matrices, spec.ranks, spec.coupling))
    torch.testing.assert_close(contract(matrices, spec.ranks), expected)


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_gradients_are_those_of_autograd(data, seed, draw_spec, random_factors):
    spec = draw_spec(data.draw, modes=3, entries=200, couplings=COUPLINGS)
    matrices = [matrix.requires_grad_() for matrix in as_matrices(random_factors(spec, seed), spec)]
    tensor = contract(matrices, spec.ranks)
    slope = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)
    expected = torch.autograd.grad(tensor, matrices, slope)
    again, pull = contract_and_pull([matrix.detach() for matrix in matrices], spec.ranks)
    torch.testing.assert_close(again, tensor.detach())
    found = pull(slope)
    assert [part.shape for part in found] == [matrix.shape for matrix in matrices]
    torch.testing.assert_close(found, list(expected))
