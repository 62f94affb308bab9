"""Weights that are kept in eval mode: the same outputs, whatever becomes of the factors."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from kronsearch.sekron import SeKronConv2d, SeKronLinear, SeKronSpec
from kronsearch.sekron.convolution import conv_geometry, kernels_formed
from kronsearch.sekron.inference import Kept, crosses
from kronsearch.sekron.layers import SeKronLayer

CP = ((6, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1))
SPECS = (
    SeKronSpec(CP, (5, 1)),
    SeKronSpec(CP, (3, 2), run=((1, 2), (0,))),  # merged
    SeKronSpec(((2, 2, 1, 1), (3, 2, 3, 3)), (3,)),  # moved
)
CONV = nn.utils.skip_init(nn.Conv2d, 4, 6, 3, padding=1)


@pytest.fixture(params=SPECS, ids=str)
def layer(request) -> SeKronConv2d:
    layer = SeKronConv2d(request.param, conv_geometry(CONV), dtype=torch.float64)
    fill(layer, 0)
    return layer.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fill(layer: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)


def infer(layer: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(images)


def by_kernel(layer: SeKronConv2d, images: torch.Tensor) -> torch.Tensor:
    """Convolve with the kernel of the factors as they are now."""
    kernel = layer.kernel.detach()
    return nn.functional.conv2d(images.to(kernel.dtype), kernel, layer.bias.detach(), padding=1)


def check(layer: SeKronConv2d, images: torch.Tensor) -> None:
    tolerance = 1e-10 if layer.bias.dtype == torch.float64 else 1e-4
    for data in (images, images.to(memory_format=torch.channels_last)):
        found = infer(layer, data.to(layer.bias.dtype))
        torch.testing.assert_close(found, by_kernel(layer, images), rtol=tolerance, atol=tolerance)


def test_weights_are_formed_once(layer, images, monkeypatch):
    formed = []
    weight = SeKronLayer._weight
    monkeypatch.setattr(SeKronLayer, "_weight", lambda self, *args: formed.append(1) or weight(self, *args))
    for _ in range(3):
        infer(layer, images)
    with torch.inference_mode():
        layer(images)
    assert len(formed) == len(layer.stages)
    layer.train()
    for _ in range(2):
        infer(layer, images)
    assert len(formed) == 3 * len(layer.stages)


def optimiser_step(layer, images, **options):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    layer(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer, _: fill(layer, 5), id="in place"),
        pytest.param(lambda layer, images: optimiser_step(layer, images, foreach=False), id="step"),
        pytest.param(lambda layer, images: optimiser_step(layer, images, foreach=True), id="foreach step"),
        pytest.param(lambda layer, images: optimiser_step(layer, images, fused=True), id="fused step"),
        pytest.param(lambda layer, _: layer.load_state_dict(other_state(layer)), id="load_state_dict"),
        pytest.param(lambda layer, _: layer.load_state_dict(other_state(layer), assign=True), id="assign"),
        pytest.param(lambda layer, _: layer.to(torch.float32), id="dtype"),
        pytest.param(lambda layer, _: layer.factors[0].detach().mul_(2), id="detached"),
        pytest.param(lambda layer, _: setattr(layer.factors[0], "data", layer.factors[0].data * 2), id="data"),
        pytest.param(lambda layer, _: layer.factors.__setitem__(1, nn.Parameter(layer.factors[1] * 2)), id="parameter"),
        pytest.param(lambda layer, _: (layer.factors[0].data.mul_(2), layer.eval()), id="data and eval"),
        pytest.param(lambda layer, _: layer.bias.detach().mul_(2), id="bias in place"),
        pytest.param(lambda layer, _: setattr(layer, "bias", nn.Parameter(layer.bias * 2)), id="another bias"),
    ],
)
def test_no_change_of_the_factors_is_missed(layer, images, change):
    check(layer, images)
    before = infer(layer, images)
    change(layer, images)
    check(layer, images)
    assert not torch.equal(infer(layer, images.to(layer.bias.dtype)).double(), before)


def test_parameters_that_torch_swaps_are_let_go(layer, images):
    check(layer, images)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(other_state(layer))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(layer, images)


def test_on_the_meta_device_it_runs_again_and_again(layer, images):
    layer = layer.to("meta")
    for data in (images.to("meta"), images.to("meta", memory_format=torch.channels_last)):
        assert infer(layer, data).shape == infer(layer, data).shape == (2, 6, 5, 7)


def other_state(layer):
    other = copy.deepcopy(layer)
    fill(other, 7)
    return other.state_dict()


def test_a_fused_step_between_a_forward_pass_and_its_gradients_is_not_missed(layer, images):
    """A fused optimiser counts no version, and here nothing runs with gradients after the weights were kept."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    loss = layer(images).square().mean()
    infer(layer, images)
    loss.backward()
    optimizer.step()
    check(layer, images)


def test_what_another_thread_puts_there_meanwhile_is_not_taken(layer, images, monkeypatch):
    check(layer, images)
    fit = Kept.fit

    def disturbed(kept, *args):
        fits = fit(kept, *args)
        layer._kept = None
        return fits

    monkeypatch.setattr(Kept, "fit", disturbed)
    for _ in range(2):
        check(layer, images)


def test_copies_go_their_own_way(layer, images):
    expected = infer(layer, images)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert twin._kept is None
        fill(twin, 9)
        check(twin, images)
        torch.testing.assert_close(infer(layer, images), expected, rtol=0, atol=0)


def test_the_state_is_of_factors_alone(layer, images):
    keys, buffer = list(layer.state_dict()), io.BytesIO()
    infer(layer, images)
    assert list(layer.state_dict()) == keys
    assert not list(layer.buffers())
    torch.save(layer.state_dict(), buffer)


def test_gradients_are_those_of_a_layer_that_never_kept_anything(layer, images):
    fresh = copy.deepcopy(layer)
    infer(layer, images)
    for each in (layer, fresh):
        each(images).square().sum().backward()
    for one, other in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_frozen_factors_pass_gradients_on(layer, images):
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(images)
    images.requires_grad_()
    (found,) = torch.autograd.grad(layer(images).square().sum(), images)
    (expected,) = torch.autograd.grad(by_kernel(layer, images).square().sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_other_tensors_in_the_place_of_parameters_are_used(layer, images):
    infer(layer, images)
    state = {name: 2 * tensor for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        found = functional_call(layer, state, (images,))
    layer.load_state_dict(state)
    torch.testing.assert_close(found, by_kernel(layer, images), rtol=1e-10, atol=1e-10)


def test_factors_made_in_inference_mode_are_run(images):
    with torch.inference_mode():
        layer = SeKronConv2d(SPECS[1], conv_geometry(CONV), dtype=torch.float64).eval()
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        torch.testing.assert_close(layer(images), by_kernel(layer, images), rtol=1e-10, atol=1e-10)
        layer.factors[0].mul_(2)
        torch.testing.assert_close(layer(images), by_kernel(layer, images), rtol=1e-10, atol=1e-10)


def test_a_trace_holds_the_factors_not_the_weights(layer, images):
    infer(layer, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that sizes become constants
        traced = torch.jit.trace(layer, images)
    fill(layer, 3)
    torch.testing.assert_close(infer(traced, images), by_kernel(layer, images), rtol=1e-10, atol=1e-10)


def test_forming_kernels_drops_what_is_kept(layer, images):
    infer(layer, images)
    with kernels_formed(layer):
        layer(images)
    assert layer._kept is None


@pytest.mark.parametrize("last", [False, True])
def test_images_keep_their_layout(layer, images, last):
    data = images.to(memory_format=torch.channels_last) if last else images
    found = infer(layer, data)
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert torch.equal(infer(layer, data[:1]), found[:1]) or not last


def test_which_layers_cross_to_channels_last_and_back():
    def crossing(spec, **options):
        conv = nn.utils.skip_init(nn.Conv2d, 4, 6, spec.kernel_shape[2:], **options)
        layer = SeKronConv2d(spec, conv_geometry(conv))
        return crosses(layer.stages, layer._last_layout)

    assert crossing(SeKronSpec(CP, (5, 1)), padding=1, stride=2)
    assert crossing(SeKronSpec(CP, (3, 2), "chain"), padding=1)
    assert not crossing(SeKronSpec(CP, (3, 2), run=((1, 2), (0,))))
    assert not crossing(SeKronSpec(((6, 1, 3, 1), (1, 4, 1, 3)), (3,)))
    assert not crossing(SeKronSpec(((3, 1, 1, 1), (2, 1, 3, 3), (1, 4, 1, 1)), (3, 2)))


def test_a_bias_that_comes_or_goes_is_not_missed(layer, images):
    bias = layer.bias
    for own in (bias, None, bias):
        layer.bias = own
        with torch.no_grad():
            found = layer(images)
        torch.testing.assert_close(found, layer.train()(images).detach(), rtol=1e-4, atol=1e-4)
        layer.eval()


def test_a_layer_may_be_called_by_the_name_of_its_argument(layer, images):
    assert torch.equal(layer(input=images), layer(images))


def test_a_linear_layer_keeps_its_weights_too():
    layer = SeKronLinear(SeKronSpec(((2, 4), (3, 2)), (4,), run=((0, 1),)), dtype=torch.float64).eval()
    fill(layer, 0)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed in range(2):
        for _ in range(2):
            expected = rows @ layer.kernel.detach().T + layer.bias.detach()
            torch.testing.assert_close(infer(layer, rows), expected, rtol=1e-10, atol=1e-10)
        assert layer._kept is not None
        fill(layer, 2 + seed)


def operations(layer: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the convolutions and products of matrices that a layer runs, in their order."""

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    infer(layer, images)
    with Listening():
        infer(layer, images)
    return [name for name in seen if name in ("convolution", "mm", "addmm", "bmm", "clone", "copy_")]


def test_pointwise_stages_are_products_and_nothing_is_copied(images):
    layer = SeKronConv2d(SeKronSpec(CP, (5, 1)), conv_geometry(CONV), dtype=torch.float64).eval()
    fill(layer, 0)
    last = images.to(memory_format=torch.channels_last)
    assert operations(layer, last) == ["mm", "convolution", "addmm"]
    assert operations(layer, images) == ["bmm", "convolution", "bmm"]
