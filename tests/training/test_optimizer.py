import copy

import pytest
import torch
from torch import nn

from kronsearch.sekron.convolution import SeKronConv2d
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.optimizer import make_optimizer, moments, restore_moments

CPU = torch.device("cpu")
CP = SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (5, 1))


@pytest.fixture
def network():
    torch.default_generator.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3)
    return nn.Sequential(nn.BatchNorm2d(4), SeKronConv2d.from_conv(conv, CP), nn.Flatten(), nn.Linear(8 * 4 * 4, 3))


def trained(network, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        network(torch.randn(5, 4, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng(devices=[]):
        yield


def test_a_kernel_of_factors_decays_as_a_dense_one(network):
    """Without gradients AdamW multiplies by 1 - lr · decay; of S factors the kernel takes on the product."""
    optimizer = make_optimizer(network, lr=0.01, weight_decay=0.3, device=CPU)
    before = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = (1 - 0.01 * 0.3 / 3) ** 3
    assert kept == pytest.approx(1 - 0.01 * 0.3, abs=5e-6)
    torch.testing.assert_close(network[1].kernel, before[1].kernel * kept)
    torch.testing.assert_close(network[3].weight, before[3].weight * (1 - 0.01 * 0.3))
    assert torch.equal(network[0].weight, before[0].weight)
    assert torch.equal(network[1].bias, before[1].bias)


def test_what_is_frozen_is_left_out(network):
    network[1].requires_grad_(False)
    optimizer = make_optimizer(network, lr=0.01, weight_decay=0.3, device=CPU)
    trained(network, optimizer, 1)
    assert {name.split("/")[0] for name in moments(optimizer, network)} == {"0.weight", "0.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_with_its_moments_it_goes_on_as_it_would_have(network, layout):
    network = network.to(memory_format=layout)
    optimizer = make_optimizer(network, lr=0.01, weight_decay=0.3, device=CPU)
    trained(network, optimizer, 2)
    twin = copy.deepcopy(network)
    other = make_optimizer(twin, lr=0.01, weight_decay=0.3, device=CPU)
    kept = {name: tensor.contiguous().clone() for name, tensor in moments(optimizer, network).items()}
    restore_moments(other, twin, kept)
    for one, optimizer_of_one in ((network, optimizer), (twin, other)):
        trained(one, optimizer_of_one, 2, seed=2)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"9.weight/exp_avg": torch.zeros(4)}, KeyError),
        ({"0.weight/exp_avg": torch.zeros(5)}, ValueError),
        ({"0.weight/other": torch.zeros(4)}, ValueError),
    ],
)
def test_moments_of_another_network_are_refused(network, state, error):
    optimizer = make_optimizer(network, lr=0.01, weight_decay=0.3, device=CPU)
    with pytest.raises(error, match=r"weight"):
        restore_moments(optimizer, network, state)
