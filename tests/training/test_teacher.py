import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kronsearch.training.teacher import Teacher, without_norms


def settled(network, seed=0):
    """Give all weights and running statistics values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return network.eval()


@contextmanager
def norms_run():
    """Tell how many batch norms run."""
    ran = []
    batch_norm = F.batch_norm

    def spy(*told, **named):
        ran.append(told)
        return batch_norm(*told, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "batch_norm", spy)
        yield ran


def images(*extents, count=3):
    return torch.randn(count, 2, *extents, generator=torch.Generator().manual_seed(1))


class Named(nn.Module):
    """Layers called by the name of their argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(input=self.conv(input=x))


class Changed(nn.Module):
    """A convolution and its norm, with something between, beside or around them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "in place":
            y.relu_()
        if self.how == "in place for others":
            y.clamp_(-100, 100)
        if self.how == "between":
            y = y.relu()
        z = self.norm(y)
        if self.how == "beside":
            z = z + y
        if self.how == "again":
            z = self.norm(self.conv(z))
        return z.relu()


KINDS = [
    (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (9,)),
    (nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), (6, 5)),
    (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding="same"), nn.BatchNorm2d(4, affine=False)), (6, 5)),
    (Named(), (6, 5)),
    (nn.Sequential(nn.Conv3d(2, 4, 2, padding_mode="circular", padding=1), nn.BatchNorm3d(4, eps=0.1)), (3, 4, 5)),
]


@pytest.mark.parametrize(("network", "extents"), KINDS)
def test_norms_that_follow_convolutions_are_taken_into_them(network, extents):
    network, data = settled(network), images(*extents)
    folded = without_norms(network, data[:1])
    with norms_run() as ran:
        found = folded(data)
    assert not ran
    torch.testing.assert_close(found, network(data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["in place", "in place for others", "between", "beside", "again"])
def test_norms_of_anything_else_are_left(how):
    network, data = settled(Changed(how)), images(6, 5)
    left = without_norms(network, data[:1])
    with norms_run() as ran:
        found = left(data)
    assert ran
    assert torch.equal(found, network(data))


@pytest.mark.parametrize("what", ["hook", "forward", "no statistics", "block"])
def test_modules_that_are_not_as_usual_are_left(what):
    network, data = settled(Changed("not")), images(6, 5)
    if what == "hook":
        network.conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    if what == "forward":
        network.norm.forward = torch.relu
    if what == "no statistics":
        network.norm = nn.BatchNorm2d(2, track_running_stats=False).eval()
    blocks = ["conv"] if what == "block" else []
    assert torch.equal(without_norms(network, data, blocks)(data), network(data))


def test_a_block_that_ends_before_the_norm_tells_what_it_told():
    network, data = settled(nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4))), images(6, 5)
    assert torch.equal(without_norms(network, data, ["0"])(data), network(data))
    assert not torch.equal(without_norms(network, data)(data), network(data))


def test_one_layer_that_can_not_lose_its_norm_keeps_no_other_from_it():
    called_twice = nn.Conv2d(2, 2, 3, padding=1)
    usual = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    network = settled(nn.Sequential(called_twice, nn.BatchNorm2d(2), nn.ReLU(), called_twice, nn.BatchNorm2d(2), usual))
    with norms_run() as ran:
        without_norms(network, images(6, 5), ["5.0"])
        assert len(ran) == 3  # of the network as it is; nothing can be left out
        ran.clear()
        folded = without_norms(network, images(6, 5))
        ran.clear()
        folded(images(6, 5))
    assert len(ran) == 2


def test_channels_that_are_none_of_the_convolution_are_left():
    network, data = settled(nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(6))), torch.randn(2, 6)
    assert torch.equal(without_norms(network, data)(data), network(data))


def test_of_outputs_that_are_zero_nothing_is_concluded():
    network = settled(Changed("beside"))
    with torch.no_grad():
        for tensor in (network.conv.bias, network.norm.bias, network.norm.running_mean):
            tensor.zero_()
    data = images(6, 5)
    assert torch.equal(without_norms(network, torch.zeros_like(data))(data), network(data))


def test_the_network_is_left_alone_and_no_random_number_is_drawn():
    network = settled(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout())).train()
    state, before = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    folded = without_norms(network, images(6, 5))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(module.training and not module._forward_hooks | module._forward_pre_hooks for module in network)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(module.training for module in folded.modules())
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def test_a_network_that_draws_random_numbers_is_compared_with_the_same_ones():
    network = settled(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Noisy()))
    with norms_run() as ran:
        without_norms(network, images(6, 5))(images(6, 5))
    assert len(ran) == 2  # to see what follows what, and of the network as it is


def test_a_teacher_tells_outputs_and_those_of_its_blocks():
    network = settled(nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Flatten()))
    network.requires_grad_()
    data = images(6, 5)
    teacher = Teacher(network, ["0"], data, precision="float32", compiled=False)
    for _ in range(2):
        outputs, blocks = teacher(data)
        torch.testing.assert_close(outputs, network(data).detach(), rtol=1e-4, atol=1e-4)
        assert blocks.keys() == {"0"}
        torch.testing.assert_close(blocks["0"], network[0](data).detach(), rtol=1e-4, atol=1e-4)
        assert not outputs.requires_grad
    assert not network[0]._forward_hooks
