"""Error tables against decompositions and naive errors."""

import random
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.errors import SpecError
from kronsearch.sekron import (
    Metric,
    Moments,
    SeKronSpec,
    chain_table,
    cp_sequence,
    cp_table,
    decompose,
    factor_pairs,
    pair_table,
    pair_tables,
    reconstruct,
    relative_error,
)
from kronsearch.sekron import tables as module
from kronsearch.sekron.tables import rank_grid

KERNELS = [(16, 12, 3, 3), (12, 3, 5, 5), (10, 24), (16, 16, 1, 1), (8, 6, 1, 7)]


def trained_like(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Draw a kernel whose unfoldings have decaying spectra, as those of trained layers: scaled modes, some noise."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    for mode, n in enumerate(shape):
        mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
        decay = 1 / torch.arange(1, n + 1, dtype=torch.float64) ** 0.7
        kernel = torch.tensordot(kernel, mix * decay[:, None], dims=([mode], [0])).movedim(-1, mode)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return kernel / kernel.norm() + 0.1 * noise / noise.norm()


def entries(table):
    """Pair the ranks of each entry, as a tuple, with its error."""
    return zip(map(tuple, table.ranks.tolist()), table.errors.tolist(), strict=True)


@pytest.mark.parametrize("kernel_shape", KERNELS, ids=str)
def test_random_entries_agree_with_the_decomposition(kernel_shape, indexed_kernel):
    """Twenty entries of each of five kernels."""
    chooser = random.Random(0)
    kernel = trained_like(kernel_shape)
    pairs = list(factor_pairs(kernel_shape))
    for _ in range(20):
        shapes = chooser.choice(pairs)
        table = pair_table(kernel, shapes)
        assert table.ranks.tolist() == [[rank] for rank in range(1, min(map(prod, shapes)) + 1)]
        place = chooser.randrange(min(8, len(table.ranks)))
        spec = SeKronSpec(shapes, (place + 1,))
        rest = kernel - indexed_kernel(decompose(kernel, spec), shapes, spec.ranks)
        naive = float(rest.square().sum() / kernel.square().sum())
        assert float(table.errors[place]) == pytest.approx(naive, abs=1e-6 * max(naive, 1e-6))


@pytest.mark.parametrize("kernel_shape", KERNELS, ids=str)
def test_pair_tables_fall_to_zero(kernel_shape):
    kernel = trained_like(kernel_shape)
    for shapes in list(factor_pairs(kernel_shape))[:40]:
        table = pair_table(kernel, shapes)
        assert bool((np.diff(table.errors) <= 0).all())
        assert 0 <= table.errors[-1] < 1e-14
        assert table.errors[0] < 1
        assert table.errors.dtype == np.float64


def test_tables_of_large_kernels_are_right_to_a_millionth_of_the_energy():
    kernel = trained_like((256, 256, 3, 3)).float()
    shapes = ((256, 1, 1, 1), (1, 256, 3, 3))
    found, expected = (pair_table(k, shapes).errors for k in (kernel, kernel.double()))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert bool((np.diff(found) <= 0).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_on_a_gpu():
    kernel = trained_like((16, 12, 3, 3))
    shapes = ((16, 1, 3, 1), (1, 12, 1, 3))
    np.testing.assert_allclose(pair_table(kernel.cuda(), shapes).errors, pair_table(kernel, shapes).errors, atol=1e-12)
    cp = cp_sequence((16, 12, 3, 3))
    found, expected = (cp_table(k, cp, 8, fits=3).errors for k in (kernel.cuda(), kernel))
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_two_pairs_by_hand():
    """Two orthogonal Kronecker products of energies 9 and 4."""
    shapes = ((2, 1), (1, 2))
    table = pair_table(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), shapes)
    np.testing.assert_allclose(table.errors, [4 / (9 + 4), 0], atol=1e-15)
    assert list(entries(table)) == [((1,), pytest.approx(4 / 13)), ((2,), 0.0)]


def test_a_kernel_of_zeros_has_no_errors():
    assert pair_table(torch.zeros(4, 6), ((4, 1), (1, 6))).errors.tolist() == [0.0] * 4
    table = cp_table(torch.zeros(4, 6, 3, 3), cp_sequence((4, 6, 3, 3)), 2, fits=2)
    np.testing.assert_allclose(table.errors, [0.0] * 2, atol=1e-11)


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("kernel_shape", [(12, 8, 3, 3), (8, 12, 1, 5)], ids=str)
def test_cp_tables_fall_and_bound_longer_fits(kernel_shape, with_metric, generator):
    kernel, shapes = trained_like(kernel_shape), cp_sequence(kernel_shape)
    metric = None
    if with_metric:
        n = prod(kernel_shape[1:])
        rows = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
        metric = Metric(Moments(rows.T @ rows / len(rows)))
    fitted_ranks = rank_grid(12, points=5)
    table = cp_table(kernel, shapes, 12, fits=5, metric=metric)
    assert set(fitted_ranks) <= set(table.ranks[:, 0].tolist()) <= set(range(1, 13))
    assert len(table.ranks) == len(table.errors) > len(fitted_ranks)
    assert bool((np.diff(table.ranks[:, 0]) > 0).all())
    assert bool((np.diff(table.errors) <= 0).all())
    tensor = kernel.permute(0, 2, 3, 1).reshape(kernel_shape[0], -1, kernel_shape[1])
    for (rank, one), error in entries(table):
        assert one == 1
        if metric is not None:
            continue
        spec = SeKronSpec(shapes, (rank, 1))
        factors = decompose(kernel, spec)
        fitted = float((kernel - _cp_kernel(factors, kernel_shape)).square().sum() / kernel.square().sum())
        # the fit from scratch is longer, but another local optimum, and so is not always the lower one
        assert 0.75 * error <= fitted <= 1.3 * error
        for mode in range(3):  # a CP sum of R terms has rank R at most in every unfolding
            values = np.linalg.svd(tensor.movedim(mode, 0).flatten(1).numpy(), compute_uv=False)
            bound = np.square(values[rank:]).sum() / np.square(values).sum()
            assert fitted >= bound * (1 - 1e-9)
            assert error >= bound * (1 - 1e-5) - 1e-6 or rank not in fitted_ranks  # which are interpolated


def _cp_kernel(factors, kernel_shape):
    """Sum the terms of three factors by numpy's einsum, which the engine doesn't use."""
    out_channels, extent, in_channels = (factor.reshape(len(factor), -1).numpy() for factor in factors)
    kernel = np.einsum("rf,rk,rc->fck", out_channels, extent, in_channels)
    return torch.from_numpy(kernel.reshape(kernel_shape))


def test_a_table_of_one_fit_is_refused():
    with pytest.raises(SpecError, match="from 1 fits was asked for: it takes two"):
        cp_table(torch.ones(4, 4, 3, 3), ((4, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), 8, fits=1)


def test_a_cp_kernel_is_found_by_the_table():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (8, 9, 6)]
    kernel = torch.einsum("rf,rk,rc->fck", *parts).reshape(8, 6, 3, 3)
    errors = dict(entries(cp_table(kernel, cp_sequence((8, 6, 3, 3)), 4, fits=10)))
    assert list(errors) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert errors[2, 1] > 0.01
    assert errors[4, 1] <= errors[3, 1] < 1e-4  # 30 sweeps in float32


@pytest.mark.parametrize("highest", [1, 2, 5])
@pytest.mark.parametrize("fits", [2, 3])
def test_cp_tables_of_few_fits_have_an_error_for_every_rank(highest, fits):
    table = cp_table(trained_like((12, 8, 3, 3)), cp_sequence((12, 8, 3, 3)), highest, fits=fits)
    assert len(table.ranks) == len(table.errors)
    assert table.ranks[-1].tolist() == [highest, 1]
    assert bool((np.diff(table.errors) <= 0).all())


@given(highest=st.integers(1, 5000), points=st.integers(2, 30))
@settings(deadline=None)
def test_rank_grid(highest, points):
    grid = rank_grid(highest, points=points)
    assert list(grid) == sorted(set(grid))
    assert len(grid) <= points + 1
    assert all(type(rank) is int for rank in grid)
    assert grid[0] >= 1
    assert grid[-1] == highest
    lowest = max(1, highest / 64)
    step = (highest / lowest) ** (1 / (points - 1))
    for low, high in pairwise(rank for rank in grid if rank >= lowest - 0.5):  # each is rounded
        assert high - 0.5 <= step * (low + 0.5) + 1e-9


def test_rank_grids_by_hand():
    assert rank_grid(64, points=7) == (1, 2, 4, 8, 16, 32, 64)
    assert rank_grid(640, points=7)[-7:] == (10, 20, 40, 80, 160, 320, 640)
    assert rank_grid(3, points=10) == (1, 2, 3)
    assert rank_grid(1, points=4) == (1,)
    assert rank_grid(0, points=4) == ()


@pytest.mark.parametrize(
    "shapes",
    [
        ((12, 1, 1, 1), (1, 1, 3, 3), (1, 8, 1, 1)),
        ((3, 4, 1, 1), (4, 1, 3, 1), (1, 2, 1, 3)),
        ((1, 8, 1, 1), (12, 1, 3, 3), (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_chain_tables_agree_with_the_decomposition(shapes, indexed_kernel):
    kernel = trained_like((12, 8, 3, 3))
    table = chain_table(kernel, shapes)
    found = list(entries(table))
    assert table.coupling == "chain"
    for ranks, error in random.Random(0).sample(found, min(15, len(found))):
        spec = SeKronSpec(shapes, ranks, "chain")
        rest = kernel - indexed_kernel(decompose(kernel, spec, refine=False), shapes, ranks, "chain")
        naive = float(rest.square().sum() / kernel.square().sum())
        assert error == pytest.approx(naive, rel=1e-6, abs=1e-12)
    assert min(table.errors) < 1e-14


def test_a_metric_weighs_chain_tables_and_other_lengths_are_refused(generator):
    kernel = trained_like((6, 4, 3, 3))
    rows = torch.randn(200, 36, generator=generator, dtype=torch.float64)
    shapes = cp_sequence((6, 4, 3, 3))
    metric = Metric(Moments(rows.T @ rows / 200))
    weighed = metric.weight(kernel.permute(0, 2, 3, 1).reshape(6, 9, 4), shapes)
    ranks, error = next(entry for entry in entries(chain_table(kernel, shapes, metric=metric)) if entry[0] == (6, 2))
    values = torch.linalg.svdvals(weighed.flatten(0, 1)).square()
    assert ranks == (6, 2)
    assert error == pytest.approx(float(values[2:].sum() / values.sum()))
    with pytest.raises(SpecError, match=r"takes three factors, .* has 2"):
        chain_table(kernel, ((6, 1, 1, 1), (1, 4, 3, 3)))


@pytest.mark.parametrize(
    "table", [lambda kernel, shapes: pair_table(kernel, shapes[:2]), chain_table, lambda *of: cp_table(*of, 8, fits=3)]
)
def test_what_can_not_be_tabulated_is_refused(table):
    shapes = ((6, 1, 3, 1), (1, 4, 1, 3), (1, 1, 1, 1))
    with pytest.raises(SpecError, match=r"multiply to \(6, 4, 3, 3\), not to the kernel's shape \(6, 4, 3\)"):
        table(torch.ones(6, 4, 3), shapes)
    with pytest.raises(SpecError, match="entries that are not finite"):
        table(torch.full((6, 4, 3, 3), torch.inf), shapes)
    with pytest.raises(SpecError, match=r"takes two factors, .* has 3"):
        pair_table(torch.ones(6, 4, 3, 3), shapes)


def test_errors_of_a_kernel_of_few_terms_are_not_promised_below_its_rank():
    """Between fits that are far apart the error is not smooth: at the rank of the kernel it falls to nothing."""
    spec = SeKronSpec(cp_sequence((24, 20, 3, 3)), (12, 1))
    generator = torch.Generator().manual_seed(3)
    kernel = reconstruct(
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in spec.tensor_shapes], spec
    )
    table = cp_table(kernel, spec.factor_shapes, 60, fits=5)
    told = dict(zip(table.ranks[:, 0].tolist(), table.errors.tolist(), strict=True))
    assert told[max(rank for rank in told if rank < 12)] > 1e-3
    assert told[min(rank for rank in told if rank >= 12)] < 1e-6
    for rank in (rank for rank in told if rank < 12):
        found = decompose(kernel, SeKronSpec(spec.factor_shapes, (rank, 1)))
        assert told[rank] > 0.5 * relative_error(kernel, found, SeKronSpec(spec.factor_shapes, (rank, 1))) ** 2


@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (16, 12), (12, 6, 3), (4, 4, 3, 2, 2)])
def test_tables_made_together_are_those_made_alone(shape):
    """Alone each Gram matrix is multiplied out; together most are traced from larger ones."""
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = list(factor_pairs(shape))
    together = pair_tables(kernel, pairs)
    assert [table.factor_shapes for table in together] == pairs
    for table, pair in zip(together, pairs, strict=True):
        alone = pair_table(kernel, pair)
        assert table.ranks.tolist() == alone.ranks.tolist()
        np.testing.assert_allclose(table.errors, alone.errors, rtol=1e-9, atol=1e-12)


def test_gram_matrices_that_would_fill_the_memory_are_not_kept(monkeypatch):
    kernel = torch.randn(8, 12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = list(factor_pairs(kernel.shape))
    kept = pair_tables(kernel, pairs)
    monkeypatch.setattr(module, "_KEPT", 10_000)
    for table, expected in zip(pair_tables(kernel, pairs), kept, strict=True):
        np.testing.assert_allclose(table.errors, expected.errors, rtol=1e-9, atol=1e-12)
