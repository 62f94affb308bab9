"""Data-aware norms: nearest Kronecker products, weighting, and what the decomposition minimises."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronsearch.sekron import (
    Metric,
    Moments,
    SeKronConv2d,
    SeKronLinear,
    SeKronSpec,
    decompose,
    pair_table,
    reconstruct,
)
from kronsearch.sekron import metrics as module
from kronsearch.sekron.contraction import contract
from kronsearch.sekron.metrics import nearest_kronecker
from kronsearch.sekron.tensors import as_matrices, unfold_kernel

RIDGE = 1e-3  # of the mean eigenvalue, which the weighting adds to every eigenvalue of every part
PAIRS = [
    ((6, 1, 3, 1), (1, 4, 1, 2)),
    ((2, 2, 3, 1), (3, 2, 1, 2)),
    ((6, 1, 1, 1), (1, 4, 3, 2)),
    ((1, 2, 1, 2), (6, 2, 3, 1)),
]


def positive(n: int, generator: torch.Generator) -> Tensor:
    """Draw a symmetric positive definite matrix with eigenvalues over two decades."""
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    values = 10 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64))
    return (vectors * values) @ vectors.T


def kron_of_digits(
    first: Tensor, second: Tensor, first_shape: tuple[int, ...], second_shape: tuple[int, ...]
) -> Tensor:
    """Return M[i, j] = first[i1, j1] · second[i2, j2], where every mode's index has the digits (i1, i2)."""
    shape = [a * b for a, b in zip(first_shape, second_shape, strict=True)]
    indices = list(np.ndindex(*shape))
    split = [
        (
            int(np.ravel_multi_index([i // n for i, n in zip(index, second_shape, strict=True)], first_shape)),
            int(np.ravel_multi_index([i % n for i, n in zip(index, second_shape, strict=True)], second_shape)),
        )
        for index in indices
    ]
    ones, twos = (torch.tensor(part) for part in zip(*split, strict=True))
    return first[ones][:, ones] * second[twos][:, twos]


def ridged(matrix: Tensor) -> Tensor:
    return matrix + RIDGE * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def kronecker_moments(shapes, generator, *, ridge: bool) -> Moments:
    """Draw moments that are Kronecker products along the digits of a sequence, with the ridge on each part or not."""
    change = ridged if ridge else (lambda matrix: matrix)
    first, second = shapes
    inputs = [positive(int(np.prod(shape[1:])), generator) for shape in shapes]
    outputs = [positive(shape[0], generator) for shape in shapes]
    return Moments(
        kron_of_digits(*map(change, inputs), first[1:], second[1:]),
        kron_of_digits(*map(change, outputs), first[:1], second[:1]),
    )


def energy(change: Tensor, moments: Moments) -> float:
    """Return tr(G ΔW Ω ΔWᵀ) by numpy."""
    rows = change.flatten(1).numpy()
    return float(np.trace(moments.outputs.numpy() @ rows @ moments.inputs.numpy() @ rows.T))


@pytest.mark.parametrize(("first_shape", "second_shape"), [((4,), (3,)), ((2, 3, 1), (2, 1, 2)), ((1, 3), (4, 1))])
def test_an_exact_kronecker_product_is_recovered(first_shape, second_shape, generator):
    first, second = (positive(int(np.prod(shape)), generator) for shape in (first_shape, second_shape))
    moment = kron_of_digits(first, second, first_shape, second_shape)
    found = nearest_kronecker(moment, (first_shape, second_shape))
    torch.testing.assert_close(kron_of_digits(*found, first_shape, second_shape), moment, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0] / found[0].trace(), first / first.trace(), rtol=1e-10, atol=1e-12)


def test_an_exact_product_of_three_is_recovered(generator):
    shapes = ((2, 1), (1, 3), (2, 2))
    parts = [positive(int(np.prod(shape)), generator) for shape in shapes]
    both = kron_of_digits(parts[1], parts[2], shapes[1], shapes[2])
    moment = kron_of_digits(parts[0], both, shapes[0], (2, 6))
    first, second, third = nearest_kronecker(moment, shapes)
    again = kron_of_digits(first, kron_of_digits(second, third, shapes[1], shapes[2]), shapes[0], (2, 6))
    torch.testing.assert_close(again, moment, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("samples", [2, 50])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 1)), ((4, 1), (1, 3)), ((2, 1), (2, 1), (1, 3)), ((4, 3), (1, 1))])
def test_the_parts_are_positive_semidefinite_and_nearer_than_the_partial_traces(shapes, samples, generator):
    rows = torch.randn(samples, 12, generator=generator, dtype=torch.float64)
    moment = rows.T @ rows / samples
    parts = nearest_kronecker(moment, shapes)
    assert [len(part) for part in parts] == [int(np.prod(shape)) for shape in shapes]
    for part in parts:
        assert torch.equal(part, part.T)
        assert float(torch.linalg.eigvalsh(part).min()) >= -1e-12 * float(part.norm())
    if len(shapes) == 2:
        found = kron_of_digits(*parts, *shapes)
        isotropic = moment.trace() / 12 * torch.eye(12, dtype=torch.float64)
        assert float((moment - found).norm()) <= float((moment - isotropic).norm()) + 1e-12


def test_two_sweeps_are_near_the_optimum(generator):
    """The optimum is the largest singular value of the rearranged moment (Van Loan and Pitsianis, 1993)."""
    rows = torch.randn(100, 12, generator=generator, dtype=torch.float64) @ positive(12, generator)
    moment = rows.T @ rows
    found = kron_of_digits(*nearest_kronecker(moment, ((4,), (3,))), (4,), (3,))
    rearranged = moment.reshape(4, 3, 4, 3).permute(0, 2, 1, 3).reshape(16, 9)
    best = float(torch.linalg.svdvals(rearranged)[1:].norm())
    assert best <= float((moment - found).norm()) * (1 + 1e-12)
    assert float((moment - found).norm()) < 1.05 * best


@pytest.mark.parametrize("shapes", [*PAIRS, ((6, 1, 1, 1), (1, 1, 3, 2), (1, 4, 1, 1))])
@pytest.mark.parametrize("with_outputs", [True, False])
def test_unweighting_undoes_weighting(shapes, with_outputs, generator, random_factors):
    metric = Metric(Moments(positive(24, generator), positive(6, generator) if with_outputs else None))
    spec = SeKronSpec(shapes, (3, *(1,) * (len(shapes) - 2)))
    matrices = as_matrices(random_factors(spec), spec)
    tensor = contract(matrices, spec.ranks)
    unweighted = metric.unweight(matrices, shapes)
    again = metric.weight(contract(unweighted, spec.ranks), shapes)
    torch.testing.assert_close(again, tensor, rtol=1e-9, atol=1e-9)
    assert float((metric.weight(tensor, shapes) - tensor).norm()) > 0.1 * float(tensor.norm())


@pytest.mark.parametrize("shapes", PAIRS)
def test_the_weighted_norm_is_the_energy_of_the_ridged_moments(shapes, generator):
    state = generator.get_state()
    plain = kronecker_moments(shapes, generator, ridge=False)
    with_ridge = kronecker_moments(shapes, generator.set_state(state), ridge=True)
    kernel, other = torch.randn(2, 6, 4, 3, 2, generator=generator, dtype=torch.float64)
    squares = [
        float(Metric(plain).weight(unfold_kernel(each, shapes), shapes).square().sum()) for each in (kernel, other)
    ]
    energies = [energy(each, with_ridge) for each in (kernel, other)]
    assert squares[0] / squares[1] == pytest.approx(energies[0] / energies[1], rel=1e-9)
    assert Metric(plain).energy(kernel) == pytest.approx(energy(kernel, plain), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shapes", PAIRS)
def test_two_factors_minimise_the_energy(shapes, rank, generator, indexed_kernel):
    """With Kronecker moments the optimum is an SVD between Cholesky roots, another root than the code's."""
    state = generator.get_state()
    metric = Metric(kronecker_moments(shapes, generator, ridge=False))
    moments = kronecker_moments(shapes, generator.set_state(state), ridge=True)
    kernel = torch.randn(6, 4, 3, 2, generator=generator, dtype=torch.float64)
    spec = SeKronSpec(shapes, (rank,))
    factors = decompose(kernel, spec, metric=metric, refine=False)

    lost = energy(kernel - indexed_kernel(factors, shapes, (rank,)), moments)
    table = pair_table(kernel, shapes, metric=metric)
    table = {tuple(ranks): error for ranks, error in zip(table.ranks.tolist(), table.errors.tolist(), strict=True)}
    assert lost / energy(kernel, moments) == pytest.approx(table[(rank,)], rel=1e-8)

    # the ridge is the one thing between the table and the moments themselves: 1e-3 of the mean eigenvalue in each of
    # four parts, against parts whose energy lies near the mean
    measured = metric.energy(kernel - reconstruct(factors, spec)) / metric.energy(kernel)
    assert measured == pytest.approx(table[(rank,)], rel=0.02)

    generator.set_state(state)
    parts = [positive(int(np.prod(shape[1:])), generator) for shape in shapes]
    parts_out = [positive(shape[0], generator) for shape in shapes]
    roots = [
        np.kron(np.linalg.cholesky(ridged(out)).T, np.linalg.cholesky(ridged(into)).T)
        for out, into in zip(parts_out, parts, strict=True)
    ]
    values = np.linalg.svd(roots[0] @ unfold_kernel(kernel, shapes).numpy() @ roots[1].T, compute_uv=False)
    assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-8)

    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            moved = [
                f + scale * f.std() * torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in factors
            ]
            assert energy(kernel - indexed_kernel(moved, shapes, (rank,)), moments) >= lost
    plain = decompose(kernel, spec)
    assert energy(kernel - indexed_kernel(plain, shapes, (rank,)), moments) > lost


def test_without_a_ridge_the_error_is_exactly_that_of_the_moments(generator, monkeypatch):
    monkeypatch.setattr(module, "_RIDGE", 0.0)
    for shapes in PAIRS:
        metric = Metric(kronecker_moments(shapes, generator, ridge=False))
        kernel = torch.randn(6, 4, 3, 2, generator=generator, dtype=torch.float64)
        spec = SeKronSpec(shapes, (2,))
        lost = metric.energy(kernel - reconstruct(decompose(kernel, spec, metric=metric, refine=False), spec))
        table = pair_table(kernel, shapes, metric=metric)
        assert lost / metric.energy(kernel) == pytest.approx(float(table.errors[1]), rel=1e-8)


def test_moments_of_nothing_weigh_as_no_metric_does(generator):
    kernel = torch.randn(6, 4, 3, 2, generator=generator, dtype=torch.float64)
    metric = Metric(Moments(torch.zeros(24, 24), torch.zeros(6, 6)))
    spec = SeKronSpec(PAIRS[0], (2,))
    torch.testing.assert_close(decompose(kernel, spec, metric=metric), decompose(kernel, spec))


def test_moments_of_few_samples_and_of_low_precision_are_taken(generator):
    rows = torch.randn(3, 24, generator=generator)
    kernel = torch.randn(6, 4, 3, 2, generator=generator)
    for shapes in PAIRS:
        metric = Metric(Moments(rows.T @ rows, rows[:, :6].T @ rows[:, :6]))
        factors = decompose(kernel, SeKronSpec(shapes, (2,)), metric=metric)
        assert all(bool(factor.isfinite().all()) for factor in factors)
        assert {factor.dtype for factor in factors} == {torch.float32}


def test_roots_are_kept_for_sequences_that_divide_the_inputs_alike(generator, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "nearest_kronecker", lambda *args: calls.append(args[1]) or nearest_kronecker(*args))
    metric = Metric(Moments(positive(24, generator), positive(6, generator)))
    kernel = torch.randn(6, 4, 3, 2, generator=generator, dtype=torch.float64)
    for shapes in (((6, 2, 3, 1), (1, 2, 1, 2)), ((3, 2, 3, 1), (2, 2, 1, 2)), ((6, 1, 3, 2), (1, 4, 1, 1))):
        pair_table(kernel, shapes, metric=metric)
    assert len(calls) == len(set(calls)) == 2 + 2  # two divisions of the inputs, two of the outputs


@pytest.mark.parametrize(
    "spec", [SeKronSpec(PAIRS[1], (1,)), SeKronSpec(((6, 1, 1, 1), (1, 1, 3, 2), (1, 4, 1, 1)), (2, 1))]
)
def test_the_bias_makes_the_mean_output_exact(spec, generator):
    conv = nn.utils.skip_init(nn.Conv2d, 4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dtype=torch.float64)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(generator=generator)
    data = torch.rand(5, 4, 6, 7, generator=generator, dtype=torch.float64)
    patches = F.unfold(data, (3, 2), stride=(1, 2), padding=(1, 0)).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = (patches - mean).T @ (patches - mean) / len(patches)
    layer = SeKronConv2d.from_conv(conv, spec, metric=Metric(Moments(centred, mean=mean)))
    torch.testing.assert_close(layer(data).mean((0, 2, 3)), conv(data).mean((0, 2, 3)), rtol=0, atol=1e-10)
    expected = conv(data).detach()
    assert float((layer(data).detach() - expected).norm()) > 0.01 * float(expected.norm())
    uncorrected = SeKronConv2d.from_conv(conv, spec, metric=Metric(Moments(centred)))
    assert torch.equal(uncorrected.bias, conv.bias)
    assert not torch.equal(layer.bias, conv.bias)


def test_the_bias_of_a_linear_layer_makes_the_mean_output_exact(generator):
    linear = nn.utils.skip_init(nn.Linear, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    rows = torch.rand(20, 8, generator=generator, dtype=torch.float64)
    metric = Metric(Moments(torch.cov(rows.T), mean=rows.mean(0)))
    layer = SeKronLinear.from_linear(linear, SeKronSpec(((3, 2), (2, 4)), (1,)), metric=metric)
    torch.testing.assert_close(layer(rows).mean(0), linear(rows).mean(0), rtol=0, atol=1e-10)


def test_a_layer_without_bias_keeps_none(generator):
    conv = nn.utils.skip_init(nn.Conv2d, 4, 6, (3, 2), bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
    metric = Metric(Moments(positive(24, generator), mean=torch.ones(24, dtype=torch.float64)))
    assert SeKronConv2d.from_conv(conv, SeKronSpec(PAIRS[0], (1,)), metric=metric).bias is None
