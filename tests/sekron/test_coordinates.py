"""Coordinates of factors: the way there and back, and that the error is round in them."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.sekron import Metric, Moments, SeKronSpec, coordinates
from kronsearch.sekron.contraction import contract
from kronsearch.sekron.coordinates import Coordinates, block_shape, row_coordinates
from kronsearch.sekron.tensors import as_matrices, leaves

SEEDS = st.integers(0, 2**16)


def definite(n, generator):
    rows = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.fixture(scope="module")
def draw_case(draw_spec, random_factors):
    def draw(data, seed, couplings):
        spec = draw_spec(data.draw, modes=3, length=data.draw(st.integers(2, 4)), entries=100, couplings=couplings)
        generator = torch.Generator().manual_seed(seed)
        shape = spec.kernel_shape
        moments = Moments(definite(shape[1] * shape[2], generator), definite(shape[0], generator))
        return spec, as_matrices(random_factors(spec, seed), spec), Metric(moments), generator

    return draw


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_the_way_there_and_back(data, seed, draw_case):
    spec, matrices, metric, _ = draw_case(data, seed, ("tree", "chain"))
    there = Coordinates(matrices, spec, metric, energy=3.0, restraint=0.1)
    torch.testing.assert_close(there.matrices(there.start), matrices)


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_the_map_is_its_own_transpose(data, seed, draw_case):
    spec, matrices, metric, generator = draw_case(data, seed, ("tree", "chain"))
    there = Coordinates(matrices, spec, metric, energy=3.0, restraint=0.1)
    ours, theirs = ([torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in matrices] for _ in range(2))
    for a, b, mapped_a, mapped_b in zip(ours, theirs, there.matrices(ours), there.matrices(theirs), strict=True):
        torch.testing.assert_close((mapped_a * b).sum(), (a * mapped_b).sum())


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_a_step_in_one_factor_costs_the_square_of_its_length(data, seed, draw_case):
    """What the factor forms with the others costs that, and what the restraint takes of its terms."""
    spec, matrices, _, generator = draw_case(data, seed, ("tree",))
    shape, energy, restraint = spec.kernel_shape, 3.0, 0.1
    metric = Metric(Moments(torch.eye(shape[1] * shape[2]), torch.eye(shape[0])))  # exact for terms as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinates, "_RIDGE", 0.0)
        there = Coordinates(matrices, spec, metric, energy=energy, restraint=restraint)
    for k, matrix in enumerate(matrices):
        step = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        moved = list(matrices)
        moved[k] = there.matrices([step if j == k else torch.zeros_like(m) for j, m in enumerate(matrices)])[k]
        formed = metric.weight(contract(moved, spec.ranks), spec.factor_shapes).square().sum()
        terms = torch.stack([leaf.square().sum(1) for leaf in leaves(moved, spec.ranks)]).prod(0).sum()
        torch.testing.assert_close(formed / energy + restraint * terms, step.square().sum(), rtol=3e-3, atol=0)


def test_factors_of_zeros_have_coordinates():
    spec = SeKronSpec(((6, 1, 1), (1, 1, 3), (1, 4, 1)), (2, 1))
    matrices = [torch.zeros(2, 6), torch.ones(2, 3), torch.ones(2, 4)]
    there = Coordinates(matrices, spec, Metric(Moments(torch.eye(12))), energy=1.0, restraint=0.0)
    torch.testing.assert_close(there.matrices(there.start), matrices)


def extents_of(spec, k):
    edges = (1, *spec.ranks, 1)
    return edges[k : k + 2] if spec.coupling == "chain" else (prod(spec.rank_shape(k)),)


@given(data=st.data(), seed=SEEDS)
@settings(deadline=None)
def test_kernels_move_as_far_as_row_coordinates(data, seed, draw_case):
    """The maps are inverse roots of what factors' rows are multiplied with, raised by no more than the ridges."""
    spec, matrices, _, _ = draw_case(data, seed, ("tree", "chain"))
    for k, rows in enumerate(row_coordinates(matrices, spec)):
        count = len(matrices[k])
        gram = formed_by_rows(spec, matrices, k)
        whole = rows.on(torch.eye(count, dtype=torch.float64), extents_of(spec, k))
        torch.testing.assert_close(whole, whole.T)
        excess = torch.linalg.eigvalsh((whole @ whole).inverse() - gram)
        most = torch.linalg.eigvalsh(gram)[-1]
        assert -1e-9 * most <= excess[0] <= excess[-1] <= 2.02e-2 * most


def formed_by_rows(spec, matrices, k):
    formed = []
    for unit in torch.eye(len(matrices[k]), dtype=torch.float64):
        moved = [unit[:, None] if j == k else matrix for j, matrix in enumerate(matrices)]
        formed.append(contract(moved, spec.ranks).flatten())
    return torch.stack(formed) @ torch.stack(formed).T


@pytest.mark.parametrize(("block", "extents"), [(5, (5, 5)), (4, (4, 4, 2)), (3, (3, 3, 3, 1)), (10, (10,))])
def test_blocks_of_rows_have_maps_of_their_own(monkeypatch, random_factors, block, extents):
    monkeypatch.setattr(coordinates, "_BLOCK", block)
    spec = SeKronSpec(((6, 1, 1), (1, 1, 9), (1, 8, 1)), (10, 1))
    matrices = as_matrices(random_factors(spec, 0), spec)
    for k, rows in enumerate(row_coordinates(matrices, spec)):
        assert rows.left.shape == block_shape(10) == (len(extents), extents[0], extents[0])
        whole = rows.on(torch.eye(10, dtype=torch.float64), (10,))
        gram = formed_by_rows(spec, matrices, k)
        for own in torch.arange(10).split(extents):
            part = whole[own][:, own]
            torch.testing.assert_close(whole[own].norm(), part.norm())  # nothing beside it
            values = torch.linalg.eigvalsh((part @ part).inverse() - gram[own][:, own])
            torch.testing.assert_close(values, values.mean().expand_as(values))  # the ridge


def test_blocks_of_a_chains_ranks_have_maps_of_their_own(monkeypatch, random_factors):
    monkeypatch.setattr(coordinates, "_BLOCK", 2)
    spec = SeKronSpec(((6, 1, 1), (1, 1, 9), (1, 8, 1)), (3, 4), "chain")
    matrices = as_matrices(random_factors(spec, 0), spec)
    _, middle, _ = row_coordinates(matrices, spec)
    assert middle.left.shape == (2, 2, 2)
    assert middle.right.shape == (2, 2, 2)
    whole = middle.on(torch.eye(12, dtype=torch.float64), (3, 4))
    blocks = (torch.block_diag(*middle.left)[:3, :3], torch.block_diag(*middle.right))
    torch.testing.assert_close(whole, torch.kron(*blocks))


def test_of_zeros_row_coordinates_are_the_rows():
    spec = SeKronSpec(((6, 1, 1), (1, 1, 3), (1, 4, 1)), (2, 1))
    for rows in row_coordinates([torch.zeros(2, 6), torch.zeros(2, 3), torch.ones(2, 4)], spec)[:2]:
        assert torch.equal(rows.left, torch.eye(2)[None])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_of_what_is_not_finite_row_coordinates_are_the_rows(value):
    spec = SeKronSpec(((6, 1, 1), (1, 1, 3), (1, 4, 1)), (2, 1))
    first, *others = row_coordinates([torch.full((2, 6), value), torch.ones(2, 3), torch.ones(2, 4)], spec)
    assert all(torch.equal(rows.left, torch.eye(2)[None]) for rows in others)
    assert first.left.isfinite().all()
