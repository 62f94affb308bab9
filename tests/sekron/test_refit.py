"""The data-aware refit: lower in the whole moments than the closed form, where it is not optimal already."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronsearch.sekron import Metric, Moments, SeKronSpec, decompose, reconstruct

KERNEL = (6, 4, 3, 2)
CP = ((6, 1, 1, 1), (1, 1, 3, 2), (1, 4, 1, 1))
SPATIAL = ((6, 1, 3, 1), (1, 4, 1, 2))
BOTTLENECK = ((6, 1, 1, 1), (1, 4, 3, 2))


def moment(n: int, generator: torch.Generator) -> Tensor:
    """Draw a moment that is no Kronecker product of anything."""
    rows = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def ridged(matrix: Tensor) -> Tensor:
    return matrix + 1e-3 * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def lost(kernel: Tensor, factors: tuple[Tensor, ...], spec: SeKronSpec, moments: Moments) -> float:
    """Return the error in the ridged moments, term by term."""
    rows = (kernel.double() - reconstruct([f.double() for f in factors], spec)).flatten(1)
    outputs = torch.eye(len(rows), dtype=rows.dtype) if moments.outputs is None else ridged(moments.outputs)
    return float(torch.einsum("fi,fg,gj,ij->", rows, outputs, rows, ridged(moments.inputs)))


@pytest.fixture
def kernel(generator) -> Tensor:
    return torch.randn(KERNEL, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "spec",
    [
        SeKronSpec(SPATIAL, (2,)),
        SeKronSpec(((2, 2, 3, 1), (3, 2, 1, 2)), (3,)),
        SeKronSpec(CP, (5, 1)),
        SeKronSpec(CP, (3, 2)),
        SeKronSpec(CP, (3, 2), "chain"),
        SeKronSpec(((3, 2, 1, 1), (2, 1, 3, 2), (1, 2, 1, 1)), (4, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_outputs", [True, False])
def test_the_whole_moments_are_met_better_than_by_kronecker_products(spec, with_outputs, kernel, generator):
    moments = Moments(moment(24, generator), moment(6, generator) if with_outputs else None)
    metric = Metric(moments)
    closed = decompose(kernel, spec, metric=metric, refine=False)
    refitted = decompose(kernel, spec, metric=metric)
    assert lost(kernel, refitted, spec, moments) < 0.97 * lost(kernel, closed, spec, moments)


@pytest.mark.parametrize(
    "spec", [SeKronSpec(BOTTLENECK, (3,)), SeKronSpec(CP, (5, 1)), SeKronSpec(CP, (5, 3), "chain")]
)
@pytest.mark.parametrize("least", [-1e-2, -0.3])
def test_moments_that_rounding_has_made_indefinite_are_no_way_down(spec, least, kernel, generator):
    """Along a negative eigenvalue the error has no minimum: steps grew until no float could hold them."""
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(0, 1, 24, dtype=torch.float64)
    values[:3] = least
    metric = Metric(Moments((basis * values) @ basis.T))
    found = reconstruct(decompose(kernel.float(), spec, metric=metric), spec)
    assert 0 < float(found.square().sum()) < 4 * float(kernel.square().sum())


def test_two_factors_end_where_nothing_near_is_better(kernel, generator):
    spec, moments = SeKronSpec(SPATIAL, (2,)), Moments(moment(24, generator), moment(6, generator))
    factors = decompose(kernel, spec, metric=Metric(moments))
    least = lost(kernel, factors, spec, moments)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            near = tuple(f + scale * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in factors)
            assert lost(kernel, near, spec, moments) > least


def test_what_is_optimal_already_stays(kernel, generator):
    """A bottleneck's inputs are weighed whole, and its outputs too: the closed form is optimal but for the ridge."""
    spec, metric = SeKronSpec(BOTTLENECK, (3,)), Metric(Moments(moment(24, generator), moment(6, generator)))
    closed, refitted = (reconstruct(decompose(kernel, spec, metric=metric, refine=r), spec) for r in (False, None))
    torch.testing.assert_close(refitted, closed, rtol=0, atol=1e-3)


@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_it_is_never_worse(data, seed, draw_spec):
    spec = draw_spec(data.draw, modes=data.draw(st.sampled_from([2, 3, 4])), entries=120, couplings=("tree", "chain"))
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(spec.kernel_shape, generator=generator, dtype=torch.float64)
    moments = Moments(moment(kernel[0].numel(), generator), moment(len(kernel), generator))
    closed = decompose(kernel, spec, metric=Metric(moments), refine=False)
    refitted = decompose(kernel, spec, metric=Metric(moments))
    whole = lost(kernel, (torch.zeros_like(kernel),), SeKronSpec((spec.kernel_shape,)), moments)
    assert lost(kernel, refitted, spec, moments) <= lost(kernel, closed, spec, moments) * (1 + 1e-6) + 1e-9 * whole


def test_terms_do_not_grow_without_bound(generator):
    """A tensor of border rank 2: ever larger terms that cancel come ever nearer to it."""
    one, two = torch.eye(2, dtype=torch.float64)
    tensor = sum(torch.einsum("f,k,c->fck", *(two if i == k else one for i in range(3))) for k in range(3))
    kernel = tensor[..., None]
    spec = SeKronSpec(((2, 1, 1, 1), (1, 1, 2, 1), (1, 2, 1, 1)), (2, 1))
    metric = Metric(Moments(moment(4, generator), moment(2, generator)))
    factors = decompose(kernel, spec, metric=metric)
    norms = [factor.flatten(1) for factor in (factors[0], factors[1][:, 0], factors[2][:, 0])]
    terms = torch.stack([rows.square().sum(1) for rows in norms]).prod(0).sum()
    assert 1 < float(terms / kernel.square().sum()) < 100


def test_kernels_of_zeros_and_moments_of_one_sample_are_taken(generator):
    row = torch.randn(1, 24, generator=generator)
    metric = Metric(Moments(row.T @ row, row[:, :6].T @ row[:, :6]))
    for shapes, ranks in ((SPATIAL, (2,)), (CP, (4, 1))):
        for kernel in (torch.zeros(KERNEL), torch.randn(KERNEL, generator=generator)):
            factors = decompose(kernel, SeKronSpec(shapes, ranks), metric=metric)
            assert all(bool(factor.isfinite().all()) and factor.dtype == torch.float32 for factor in factors)
