import copy
from math import prod

import pytest
import torch
from torch import nn

from kronsearch.sekron import coordinates
from kronsearch.sekron.convolution import SeKronConv2d
from kronsearch.sekron.coordinates import row_coordinates
from kronsearch.sekron.layers import SeKronLinear
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import as_matrices
from kronsearch.training import optimizer as module
from kronsearch.training.optimizer import FactorAdamW

CPU = torch.device("cpu")
SHAPES = ((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1))
SPECS = {
    "CP": SeKronSpec(SHAPES, (5, 1)),
    "tree": SeKronSpec(SHAPES, (3, 2)),
    "chain": SeKronSpec(SHAPES, (5, 3), "chain"),
    "two": SeKronSpec(((4, 2, 1, 1), (2, 2, 3, 3)), (4,)),
    "one": SeKronSpec(((8, 4, 3, 3),)),
}


@pytest.fixture(params=SPECS)
def network(request):
    torch.default_generator.manual_seed(0)
    layer = SeKronConv2d.from_conv(nn.Conv2d(4, 8, 3), SPECS[request.param])
    return nn.Sequential(nn.BatchNorm2d(4), layer, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 2 * 2, 3))


def optimizer_of(network, weight_decay=0.3, highest_rate=0.0):
    return FactorAdamW(network, weight_decay=weight_decay, highest_rate=highest_rate, device=CPU)


def trained(network, optimizer, steps, seed=1, rate=0.01):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        network(torch.randn(5, 4, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step(rate)


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng(devices=[]):
        yield


def test_a_kernel_of_factors_decays_as_a_dense_one(network):
    """Without gradients AdamW multiplies by 1 - lr · decay; of S factors the kernel takes on the product."""
    optimizer = optimizer_of(network)
    before = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.01)
    count = len(network[1].factors)
    kept = (1 - 0.01 * 0.3 / count) ** count
    assert kept == pytest.approx(1 - 0.01 * 0.3, abs=5e-6)
    torch.testing.assert_close(network[1].kernel, before[1].kernel * kept)
    torch.testing.assert_close(network[4].weight, before[4].weight * (1 - 0.01 * 0.3))
    assert torch.equal(network[0].weight, before[0].weight)
    assert torch.equal(network[1].bias, before[1].bias)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_first_step_is_the_sign_of_the_gradient_in_the_coordinates(network):
    """AdamW's first step, written out, of a dense weight and of each factor."""
    optimizer, before = optimizer_of(network, 0.0), copy.deepcopy(network)
    loss = network(torch.randn(5, 4, 6, 6)).square().mean()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    optimizer.step(0.01)
    slope = gradients["4.weight"]
    expected = before[4].weight - 0.01 * slope / (slope.abs() + 1e-8)
    torch.testing.assert_close(network[4].weight, expected, atol=1e-5, rtol=0)
    layer = before[1]
    with torch.no_grad():
        coordinates = row_coordinates(as_matrices(list(layer.factors), layer.spec), layer.spec)
        for k, (rows, old) in enumerate(zip(coordinates, layer.factors, strict=True)):
            edges = (1, *layer.spec.ranks, 1)[k : k + 2] if layer.spec.coupling == "chain" else old.shape[:0]
            extents = edges or (len(as_matrices(list(layer.factors), layer.spec)[k]),)
            slope = rows.on(gradients[f"1.factors.{k}"].reshape(prod(extents), -1), extents)
            step = rows.on(0.01 * slope / (slope.abs() + 1e-8), extents).view_as(old)
            torch.testing.assert_close(network[1].factors[k], old - step, atol=1e-5, rtol=1e-4)


def test_how_factors_are_scaled_is_of_no_account(network):
    """A kernel goes the same way whichever of its factors is how large."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[1].factors[0].mul_(8)
        other[1].factors[-1].div_(8)
    for one in (network, other):
        trained(one, optimizer_of(one, 0.0), 3)
    before = network[1].kernel.detach()
    torch.testing.assert_close(other[1].kernel.detach(), before, atol=1e-5, rtol=1e-3)


def test_coordinates_are_taken_anew_after_ever_more_steps(monkeypatch, network):
    renewed, renew = [], FactorAdamW._renew
    optimizer = optimizer_of(network)
    monkeypatch.setattr(FactorAdamW, "_renew", lambda self: renewed.append(self._taken) or renew(self))
    for _ in range(450):
        optimizer.step(0.01)
    assert renewed == [0, 100, 200, 400]


def test_what_is_frozen_is_left_out(network):
    network[1].requires_grad_(False)
    optimizer = optimizer_of(network)
    trained(network, optimizer, 1)
    names = {name.split("/")[0] for name in optimizer.state()}
    assert names == {"", *(f"{k}.{kind}" for k in (0, 2, 4) for kind in ("weight", "bias"))}


def test_a_factor_without_a_gradient_stays(network):
    network[1].factors[-1].requires_grad_(False)
    optimizer, before = optimizer_of(network), copy.deepcopy(network)
    trained(network, optimizer, 1)
    for factor, old in zip(network[1].factors, before[1].factors, strict=True):
        assert torch.equal(factor, old) is not factor.requires_grad
    after = copy.deepcopy(network)
    optimizer.step(0.01)  # nothing has a gradient
    assert all(torch.equal(p, after.get_parameter(name)) for name, p in network.named_parameters())


def layers_of_ranks(*ranks):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.ModuleList(
            SeKronConv2d.from_conv(nn.Conv2d(4, 8, 3, bias=False), SeKronSpec(SHAPES, (r, 1))) for r in ranks
        )


@pytest.mark.parametrize("thin", [0, 9, 16])
def test_factors_that_are_moved_together_go_as_they_would_alone(monkeypatch, thin):
    """Of other ranks, some of them so much fewer that they are not filled up to the same."""
    layers = layers_of_ranks(5, 1, 4, 3, 5)
    alone = copy.deepcopy(layers)
    each = [optimizer_of(layer) for layer in alone]
    monkeypatch.setattr(module, "THIN", thin)
    together = optimizer_of(layers)
    assert len(together._movers) < sum(len(optimizer._movers) for optimizer in each)
    for _ in range(3):
        images = torch.randn(5, 4, 6, 6)
        sum(layer(images).square().mean() for layer in layers).backward()
        together.step(0.01)
        for layer, optimizer in zip(alone, each, strict=True):
            layer(images).square().mean().backward()
            optimizer.step(0.01)
    for name, parameter in layers.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), atol=1e-6, rtol=1e-5)
    state = together.state()
    assert int(state.pop("/taken")) == 3
    parts = {
        f"{k}.{name}": part for k, own in enumerate(each) for name, part in own.state().items() if name != "/taken"
    }
    assert state.keys() == parts.keys()
    for name, part in parts.items():
        torch.testing.assert_close(state[name], part, atol=1e-6, rtol=1e-3, msg=name)


def test_of_factors_that_are_moved_together_those_without_a_gradient_stay():
    layers = layers_of_ranks(4, 4)
    optimizer, images = optimizer_of(layers), torch.ones(2, 4, 5, 5)
    for used in (True, False, True):
        before = copy.deepcopy(layers)
        known = {name: part.clone() for name, part in optimizer.state().items()}
        loss = layers[0](images).square().mean()
        if used:
            loss = loss + layers[1](images).square().mean()
        loss.backward()
        optimizer.step(0.01)
        for name, parameter in layers.named_parameters():
            changes = used or name.startswith("0.")
            assert torch.equal(parameter, before.get_parameter(name)) is not changes
            for kind in ("exp_avg", "exp_avg_sq") if known["/taken"] else ():
                assert torch.equal(optimizer.state()[f"{name}/{kind}"], known[f"{name}/{kind}"]) is not changes


def test_rows_in_blocks_go_on_as_well(monkeypatch, network):
    monkeypatch.setattr(coordinates, "_BLOCK", 2)
    test_with_its_state_it_goes_on_as_it_would_have(network, torch.contiguous_format)


@pytest.mark.parametrize("scale", [1e-2, 1e-5])
def test_a_kernel_that_is_small_beside_the_rate_goes_no_farther_than_a_dense_one(network, scale):
    """A product of S factors that are all small would go by the S-th power of the rate over what is left of it."""
    with torch.no_grad():
        for factor in network[1].factors:
            factor.mul_(scale ** (1 / len(network[1].factors)))
    before = network[1].kernel.detach().clone()
    trained(network, optimizer_of(network, 0.0, highest_rate=0.01), 50)
    moved = (network[1].kernel.detach() - before).square().mean().sqrt()
    assert 1e-3 * scale < moved < 50 * 0.01


def test_steps_are_shortened_for_small_kernels_alone(network):
    other = copy.deepcopy(network)
    trained(network, optimizer_of(network), 3, rate=1e-3)
    trained(other, optimizer_of(other, highest_rate=1e-3), 3, rate=1e-3)
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in network.named_parameters())


def test_factors_of_any_precision_and_layout_take_the_same_steps(network):
    """A linear layer's factors of four dimensions may lie in memory as images do; bf16 has 8 bits of mantissa."""
    chain = SeKronLinear.from_linear(nn.Linear(12, 8), SeKronSpec(((2, 3), (2, 2), (2, 2)), (3, 2), "chain"))
    last = copy.deepcopy(chain).to(memory_format=torch.channels_last)
    assert not all(factor.is_contiguous() for factor in last.factors)
    less = copy.deepcopy(chain).to(torch.bfloat16)
    for layer in (chain, last, less):
        optimizer = optimizer_of(layer, highest_rate=0.01)
        layer(torch.eye(12).to(layer.factors[0].dtype)).square().sum().backward()
        optimizer.step(0.01)
    torch.testing.assert_close(last.kernel, chain.kernel)
    torch.testing.assert_close(less.kernel.float(), chain.kernel, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_with_its_state_it_goes_on_as_it_would_have(network, layout):
    network = network.to(memory_format=layout)
    assert network[2].weight.is_contiguous() is (layout == torch.contiguous_format)
    optimizer = optimizer_of(network)
    trained(network, optimizer, 2)
    twin = copy.deepcopy(network)
    other = optimizer_of(twin)
    kept = {name: tensor.contiguous().clone() for name, tensor in optimizer.state().items()}
    other.restore(kept)
    for one, optimizer_of_one in ((network, optimizer), (twin, other)):
        trained(one, optimizer_of_one, 2, seed=2)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_before_the_first_step_there_is_nothing_to_go_on_with(network):
    optimizer, other = optimizer_of(network), optimizer_of(network)
    trained(network, optimizer, 1)
    assert any(tensor.any() for tensor in optimizer.state().values())
    optimizer.restore(other.state())
    state = optimizer.state()
    assert not any(tensor.any() for tensor in state.values())
