"""Kernels to factors: exact where they should be, optimal for two, jointly fitted for three and more."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kronsearch.sekron
from kronsearch.errors import SpecError
from kronsearch.sekron import Metric, Moments, SeKronSpec, decompose, reconstruct, relative_error

CP = ((6, 1, 1, 1), (1, 1, 3, 3), (1, 5, 1, 1))


def draw_kernel(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_every_name_of_the_engine_is_what_it_says():
    """Also after all submodules are imported: a submodule must not take the place of a function of its name."""
    for name in kronsearch.sekron.__all__:
        assert callable(getattr(kronsearch.sekron, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kronsearch.sekron.nothing  # noqa: B018


def test_one_factor_is_the_kernel_itself():
    kernel = draw_kernel((4, 3, 2, 3))
    spec = SeKronSpec((tuple(kernel.shape),))
    (factor,) = decompose(kernel, spec)
    assert torch.equal(factor, kernel)
    assert factor.data_ptr() != kernel.data_ptr()
    assert torch.equal(reconstruct([factor], spec), kernel)
    assert relative_error(kernel, [factor], spec) == 0


@pytest.mark.parametrize(
    ("shapes", "ranks", "tolerance"),
    [
        (((6, 1, 3, 1), (1, 5, 1, 3)), (5 * 3,), 1e-12),
        (((2, 5, 1, 1), (3, 1, 3, 3)), (2 * 5,), 1e-12),
        (((3, 1), (2, 4)), (3,), 1e-12),
        (((6, 1, 1, 1), (1, 1, 3, 3), (1, 5, 1, 1)), (6, 5), 1e-6),  # a joint fit stops near rounding
        (((3, 1), (2, 2), (1, 2)), (3, 2), 1e-6),
    ],
)
def test_full_ranks_are_exact(shapes, ranks, tolerance):
    spec = SeKronSpec(shapes, ranks)
    kernel = draw_kernel(spec.kernel_shape)
    assert relative_error(kernel, decompose(kernel, spec), spec) < tolerance
    assert relative_error(kernel, decompose(kernel, spec, refine=False), spec) < 1e-12


@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_shapes_dtypes_and_the_error_on_random_specs(data, seed, draw_spec, indexed_kernel):
    spec = draw_spec(data.draw, modes=data.draw(st.sampled_from([2, 4])), entries=120, couplings=("tree", "chain"))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    kernel = draw_kernel(spec.kernel_shape, seed, dtype)
    factors = decompose(kernel, spec)
    assert [tuple(factor.shape) for factor in factors] == list(spec.tensor_shapes)
    assert {factor.dtype for factor in factors} == {dtype}
    wide = kernel.double()
    rest = wide - indexed_kernel([factor.double() for factor in factors], spec.factor_shapes, spec.ranks, spec.coupling)
    error = float(rest.norm() / wide.norm())
    assert relative_error(kernel, factors, spec) == pytest.approx(error, rel=1e-9, abs=1e-14)
    recursion = decompose(wide, spec, refine=False)
    rounding = 4 * len(factors) * torch.finfo(dtype).eps  # one rounding of each factor
    # where the recursion is optimal, the restraint on the terms costs a joint fit a little
    assert error <= 1.01 * relative_error(wide, recursion, spec) + rounding + 1e-8


@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_two_factors_reach_the_optimum(data, seed, draw_spec):
    """The optimum by numpy: singular values of the kernel, rearranged entry by entry."""
    spec = draw_spec(data.draw, modes=data.draw(st.sampled_from([2, 3])), length=2, entries=100)
    kernel = draw_kernel(spec.kernel_shape, seed)
    first, second = spec.factor_shapes
    matrix = np.zeros((int(np.prod(first)), int(np.prod(second))))
    for index in np.ndindex(*kernel.shape):
        row = np.ravel_multi_index([i // n for i, n in zip(index, second, strict=True)], first)
        column = np.ravel_multi_index([i % n for i, n in zip(index, second, strict=True)], second)
        matrix[row, column] = kernel[index]
    values = np.linalg.svd(matrix, compute_uv=False)
    best = float(np.sqrt(np.square(values[spec.ranks[0] :]).sum() / np.square(values).sum()))
    assert relative_error(kernel, decompose(kernel, spec), spec) == pytest.approx(best, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("ranks", [(3, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_of_tree_ranks_are_found_by_the_joint_fit_only(ranks, seed, random_factors, indexed_kernel):
    spec = SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 10, 1, 1)), ranks)
    kernel = indexed_kernel(random_factors(spec, seed), spec.factor_shapes, spec.ranks, spec.coupling)
    assert relative_error(kernel, decompose(kernel, spec, refine=False), spec) > 0.05
    assert relative_error(kernel, decompose(kernel, spec), spec) <= 1e-5


def test_norms_are_balanced_in_every_term():
    for spec in (SeKronSpec(((6, 1, 3, 1), (1, 5, 1, 3)), (4,)), SeKronSpec(CP, (4, 1))):
        factors = decompose(draw_kernel(spec.kernel_shape), spec)
        norms = torch.stack([factor.reshape(4, -1).norm(dim=1) for factor in factors])
        torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-9, atol=0)


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_kernel_that_is_not_finite_is_refused(entry):
    kernel = torch.ones(4, 4)
    kernel[1, 2] = entry
    for spec in (SeKronSpec(((4, 1), (1, 4)), (1,)), SeKronSpec(((4, 4),))):
        with pytest.raises(SpecError, match="entries that are not finite"):
            decompose(kernel, spec)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.ones(4, 4, dtype=torch.complex64), "the kernel is complex64: only"),
        (torch.ones(4, 4, dtype=torch.int64), "the kernel is int64: only"),
        (torch.ones(4, 4, device="meta"), "the kernel is on the meta device"),
    ],
)
def test_a_kernel_that_is_not_of_real_numbers_is_refused(kernel, message):
    with pytest.raises(SpecError, match=message):
        decompose(kernel, SeKronSpec(((4, 1), (1, 4)), (1,)))


@pytest.mark.parametrize(
    "spec",
    [SeKronSpec(CP, (4, 1)), SeKronSpec(CP, (3, 3), "chain"), SeKronSpec((*CP[:1], (1, 5, 3, 3)), (3,))],
    ids=str,
)
@pytest.mark.parametrize(
    ("kernels", "inputs", "outputs"), [(1e-20, 1, 1), (1e18, 1, 1), (1, 1e-10, 1e-10), (1, 1e8, 1e10), (1e-6, 1e6, 1)]
)
def test_the_unit_of_a_kernel_and_of_its_moments_changes_nothing(spec, kernels, inputs, outputs):
    """A layer that is all but dead behind its batch norm, or a network of large outputs, is one like any other."""
    kernel, rows, columns = (
        draw_kernel(shape, k, torch.float32) for k, shape in enumerate([(6, 5, 3, 3), (99, 45), (99, 6)])
    )
    moments = [rows.T @ rows / 99, columns.T @ columns / 99]

    def error(kernels, inputs, outputs):
        factors = decompose(kernel * kernels, spec, metric=Metric(Moments(moments[0] * inputs, moments[1] * outputs)))
        lost = kernel.double() - reconstruct([factor.double() for factor in factors], spec) / kernels
        return Metric(Moments(*moments)).energy(lost)

    assert error(kernels, inputs, outputs) == pytest.approx(error(1, 1, 1), rel=0.02)


def test_a_kernel_of_zeros():
    for spec in (SeKronSpec(((6, 1, 3, 1), (1, 5, 1, 3)), (4,)), SeKronSpec(CP, (4, 2))):
        kernel = torch.zeros(spec.kernel_shape)
        factors = decompose(kernel, spec)
        assert not reconstruct(factors, spec).any()
        assert relative_error(kernel, factors, spec) == 0


def test_a_kernel_that_learns_is_not_recorded():
    kernel = draw_kernel((6, 5, 3, 3)).requires_grad_()
    assert not any(factor.requires_grad for factor in decompose(kernel, SeKronSpec(CP, (2, 1))))
    assert not decompose(kernel, SeKronSpec(((6, 5, 3, 3),)))[0].requires_grad


def test_the_same_kernel_gives_the_same_factors():
    spec, kernel = SeKronSpec(CP, (4, 2)), draw_kernel((6, 5, 3, 3))
    assert all(map(torch.equal, decompose(kernel, spec), decompose(kernel, spec)))


def test_layouts_do_not_matter():
    spec, kernel = SeKronSpec(CP, (4, 2)), draw_kernel((6, 5, 3, 3))
    strided = kernel.to(memory_format=torch.channels_last)
    torch.testing.assert_close(decompose(strided, spec), decompose(kernel, spec), rtol=0, atol=1e-9)


def test_a_spec_of_another_kernel_is_refused():
    with pytest.raises(SpecError, match=r"not to the kernel's shape \(6, 5, 3, 1\)"):
        decompose(draw_kernel((6, 5, 3, 1)), SeKronSpec(CP, (2, 1)))
