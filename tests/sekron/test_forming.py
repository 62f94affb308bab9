"""Kernels formed together, against the tests' own oracle: values, gradients, precision and layout."""

import pytest
import torch

from kronsearch.sekron import SeKronSpec
from kronsearch.sekron.forming import form_kernels

EXACT = 1e-10  # float64: sums of some hundred products of order one

CP = ((4, 1, 1, 1), (1, 1, 3, 3), (1, 3, 1, 1))
SPECS = [
    SeKronSpec(CP, (5, 1)),
    SeKronSpec(((1, 3, 1, 1), (4, 1, 1, 1), (1, 1, 3, 3)), (3, 1)),  # the same modes in another order
    SeKronSpec(((2, 3, 1, 3), (2, 1, 3, 1)), (4,)),
    SeKronSpec(CP, (2, 1)),  # with the first, in one group
    SeKronSpec(((1, 2, 3, 3), (4, 2, 1, 1)), (1,)),
    SeKronSpec(((2, 1, 3, 1), (2, 2, 1, 1), (1, 2, 1, 3)), (6, 1)),  # digits of a mode on several factors
    SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 3), (1, 3, 1, 1)), (2, 2)),  # no single sum
    SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 3), (1, 3, 1, 1)), (3, 2), "chain"),
    SeKronSpec(((4, 3, 2, 2),)),
    SeKronSpec(((4, 1, 1), (1, 1, 3), (1, 5, 1)), (4, 1)),
    SeKronSpec(((2, 1, 1, 3, 1), (2, 3, 2, 1, 2)), (3,)),
    SeKronSpec(((1, 1, 1, 1), (1, 1, 1, 1)), (1,)),
]


@pytest.fixture
def factors(random_factors):
    return [[f.requires_grad_() for f in random_factors(spec, seed)] for seed, spec in enumerate(SPECS)]


def test_kernels_and_gradients_are_those_of_the_definition(factors, indexed_kernel, generator):
    expected = [
        indexed_kernel(own, spec.factor_shapes, spec.ranks, spec.coupling)
        for own, spec in zip(factors, SPECS, strict=True)
    ]
    found = form_kernels(SPECS, factors)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    towards = [torch.randn(spec.kernel_shape, generator=generator, dtype=torch.float64) for spec in SPECS]
    leaves = [factor for own in factors for factor in own]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, towards), torch.autograd.grad(expected, leaves, towards), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_differences(spec, random_factors):
    factors = [factor.requires_grad_() for factor in random_factors(spec)]
    assert torch.autograd.gradcheck(lambda *own: form_kernels([spec], [own])[0], factors)


def test_gradients_may_come_in_any_layout(random_factors, generator):
    factors = [factor.requires_grad_() for factor in random_factors(SPECS[0])]
    towards = torch.randn(SPECS[0].kernel_shape, generator=generator, dtype=torch.float64)
    (kernel,) = form_kernels(SPECS[:1], [factors])
    layouts = (towards, towards.to(memory_format=torch.channels_last))
    plain, last = (torch.autograd.grad(kernel, factors, given, retain_graph=True) for given in layouts)
    torch.testing.assert_close(plain, last, rtol=0, atol=EXACT)


def test_a_kernel_without_use_gives_gradients_of_zeros(random_factors):
    factors = [[f.requires_grad_() for f in random_factors(SPECS[k])] for k in (0, 3)]
    used, _ = form_kernels([SPECS[0], SPECS[3]], factors)
    used.sum().backward()
    assert all(bool(factor.grad.any()) for factor in factors[0])
    assert not any(bool(factor.grad.any()) for factor in factors[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_of_the_factors_precision_inside_of_autocast_too(dtype, random_factors):
    factors = [[f.to(dtype).requires_grad_() for f in random_factors(spec)] for spec in SPECS]
    expected = form_kernels(SPECS, factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = form_kernels(SPECS, factors)
        leaves = [factor for own in factors for factor in own]
        gradients = torch.autograd.grad([kernel.sum() for kernel in found[:6]], leaves[:16])
    assert {kernel.dtype for kernel in found} == {gradient.dtype for gradient in gradients} == {dtype}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_kernels_of_images_have_their_channels_last(factors):
    for kernel in form_kernels(SPECS[:6], factors[:6]):
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_factors_may_have_their_channels_last(random_factors):
    spec = SeKronSpec(((4, 1, 3), (2, 5, 1)), (3,))
    factors = random_factors(spec)
    last = [factor.to(memory_format=torch.channels_last) for factor in factors]  # as Module.to makes them
    (expected,), (found,) = form_kernels([spec], [factors]), form_kernels([spec], [last])
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_factors_of_several_precisions_are_kept_apart(random_factors):
    factors = [random_factors(SPECS[0]), [f.float() for f in random_factors(SPECS[3])]]
    assert [kernel.dtype for kernel in form_kernels([SPECS[0], SPECS[3]], factors)] == [torch.float64, torch.float32]
    assert form_kernels([], []) == []


def test_kernels_of_float32_are_rounded_where_that_is_wanted_and_gradients_are_not(random_factors, generator):
    factors = [[f.float().requires_grad_() for f in random_factors(spec)] for spec in SPECS]
    exact, rounded = form_kernels(SPECS, factors), form_kernels(SPECS, factors, torch.bfloat16)
    torch.testing.assert_close(rounded, [kernel.bfloat16() for kernel in exact], rtol=0, atol=0)
    towards = [torch.randn(spec.kernel_shape, generator=generator).bfloat16() for spec in SPECS]
    leaves = [factor for own in factors for factor in own]
    found = torch.autograd.grad(rounded, leaves, towards)
    expected = torch.autograd.grad(exact, leaves, [one.float() for one in towards])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [k.dtype for k in form_kernels(SPECS[:1], [random_factors(SPECS[0])], torch.bfloat16)] == [torch.float64]
