import pytest
import torch
from torch import nn

from kronsearch.models.statistics import gather_moments
from kronsearch.training.data import TensorData
from kronsearch.training.task import Classification

IMAGES = 24


def make_data():
    generator = torch.Generator().manual_seed(0)
    split = (
        torch.randint(0, 256, (IMAGES, 2, 5, 6), generator=generator, dtype=torch.uint8),
        torch.randint(0, 3, (IMAGES,), generator=generator),
    )
    return TensorData(
        {"train": split, "val": split, "test": split},
        spec="made",
        seed=0,
        task=Classification(),
        mean=(0.4, 0.5),
        std=(0.2, 0.3),
        pad=0,
        flip=False,
    )


class Net(nn.Module):
    """Convolution, batch norm, convolution with bias, linear layer: each kind of centring once."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, (1, 2), dilation=(1, 2), padding_mode="reflect", padding=(0, 1))
        self.plain = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        y = self.second(self.norm(self.first(x)).relu())
        return self.plain(y.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def generator():
    return torch.Generator().manual_seed(1)


def naive_patches(data, conv):
    """Every input patch, by a loop over outputs, (patches, C·kh·kw)."""
    (top, left), (kh, kw) = conv.padding, conv.kernel_size
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    data = nn.functional.pad(data, (left, left, top, top), mode=mode)
    (sh, sw), (dh, dw) = conv.stride, conv.dilation
    rows = []
    for i in range(0, data.shape[2] - dh * (kh - 1), sh):
        for j in range(0, data.shape[3] - dw * (kw - 1), sw):
            window = data[:, :, i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw]
            rows.append(window.flatten(1))
    return torch.cat(rows)


def seen_inputs(net, name):
    found = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    batches = make_data().train_batches(IMAGES, generator=generator())
    net(next(iter(batches))[0])
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ["first", "second"])
def test_moments_of_inputs_equal_a_loop_over_patches(net, name):
    moments = gather_moments(net, make_data(), ["first", "second", "plain"], images=IMAGES, generator=generator())
    patches = naive_patches(seen_inputs(net, name), net.get_submodule(name))
    expected = patches.T @ patches / len(patches) - torch.outer(patches.mean(0), patches.mean(0))
    assert torch.allclose(moments[name].inputs, expected, atol=1e-5)  # float32 sums in another order
    if name == "first":  # the batch norm behind takes up the mean
        assert moments[name].mean is None
    else:
        assert torch.allclose(moments[name].mean, patches.mean(0), atol=1e-5)


def test_without_bias_or_norm_moments_are_not_centred(net):
    rows = seen_inputs(net, "plain")
    moments = gather_moments(net, make_data(), ["plain"], images=IMAGES, generator=generator())["plain"]
    assert torch.allclose(moments.inputs, rows.T @ rows / len(rows), atol=1e-5)
    assert moments.mean is None


def test_moments_of_gradients_are_the_mean_squared_jacobian_in_expectation():
    layer = nn.Linear(3, 3, bias=False)
    head = nn.Linear(3, 2, bias=False)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(30, 3), nn.Flatten(1), nn.Linear(6, 3), layer, head).eval()
    found = gather_moments(net, make_data(), ["4"], images=4000, generator=generator())["4"].outputs
    weight = head.weight.detach()
    expected = weight.T @ weight  # outputs in random directions: E[(Jᵀξ)(Jᵀξ)ᵀ] = JᵀJ
    assert torch.allclose(found, expected, atol=0.1 * float(expected.diagonal().sum()))  # 4,000 random directions


def test_which_other_layers_are_named_changes_nothing(net):
    one = gather_moments(net, make_data(), ["second"], images=IMAGES, generator=generator())["second"]
    all_three = gather_moments(net, make_data(), ["first", "second", "plain"], images=IMAGES, generator=generator())
    assert torch.equal(one.inputs, all_three["second"].inputs)
    assert torch.equal(one.outputs, all_three["second"].outputs)


def test_an_activation_in_place_between_layer_and_norm_is_no_norm_behind():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Flatten()).eval()
    moments = gather_moments(net, make_data(), ["0"], images=IMAGES, generator=generator())["0"]
    rows = next(iter(make_data().train_batches(IMAGES, generator=generator())))[0].permute(0, 2, 3, 1).reshape(-1, 2)
    assert torch.allclose(moments.inputs, rows.T @ rows / len(rows), atol=1e-5)


def test_modes_hooks_and_gradients_are_left_as_they_were(net):
    net.norm.train()
    gather_moments(net, make_data(), ["first"], images=IMAGES, generator=generator())
    assert net.norm.training
    assert not net.first.training
    assert not net.first._forward_hooks
    assert not net.norm._forward_pre_hooks
    assert all(parameter.grad is None for parameter in net.parameters())
    net.norm.eval()


def test_a_frozen_network_has_gradients_all_the_same(net):
    frozen = Net().eval().requires_grad_(False)
    found = gather_moments(frozen, make_data(), ["first"], images=IMAGES, generator=generator())["first"]
    assert float(found.outputs.diagonal().sum()) > 0
