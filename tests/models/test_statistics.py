from itertools import product
from math import ceil, prod

import numpy as np
import pytest
import torch
from torch import nn

from kronsearch.errors import ModelError
from kronsearch.models import patches as grids
from kronsearch.models.factorised import factorise
from kronsearch.models.statistics import gather_moments
from kronsearch.sekron import Metric, SeKronSpec
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


def test_moments_are_float32_whatever_torch_makes_by_default(net):
    expected = gather_moments(net, make_data(), ["first"], images=IMAGES, generator=generator())["first"]
    torch.set_default_dtype(torch.float64)
    try:
        found = gather_moments(net, make_data(), ["first"], images=IMAGES, generator=generator())["first"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.inputs, expected.inputs)
    assert found.outputs.dtype == torch.float32


def test_without_bias_or_norm_moments_are_not_centred(net):
    rows = seen_inputs(net, "plain")
    moments = gather_moments(net, make_data(), ["plain"], images=IMAGES, generator=generator())["plain"]
    assert torch.allclose(moments.inputs, rows.T @ rows / len(rows), atol=1e-5)
    assert moments.mean is None


class Raised(nn.Module):
    def forward(self, x):
        return 1e3 + 0.1 * x


@pytest.mark.parametrize("bias", [True, False])
def test_what_inputs_vary_by_may_be_little_beside_their_mean(bias):
    net = nn.Sequential(Raised(), nn.Conv2d(2, 4, 3, bias=bias), nn.Flatten(), nn.Linear(48, 3)).eval()
    found = gather_moments(net, make_data(), ["1"], images=IMAGES, generator=generator())["1"].inputs
    patches = naive_patches(seen_inputs(net, "1"), net[1]).double()
    rows = patches - patches.mean(0) if bias else patches
    expected = (rows.T @ rows / len(rows)).float()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-5 if bias else 0)
    if bias:  # without, the mean has all but one eigenvalue drowned in it
        assert torch.linalg.eigvalsh(found.double()).min() > 0


def test_a_layer_that_sees_nothing_at_first(net):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(60, 3)

        def forward(self, x):
            self.layer(x.flatten(1)[:0])
            return self.layer(x.flatten(1))

    late = Late().eval()
    found = gather_moments(late, make_data(), ["layer"], images=IMAGES, generator=generator())["layer"]
    rows = next(iter(make_data().train_batches(IMAGES, generator=generator())))[0].flatten(1)
    assert torch.allclose(found.mean[0], rows.mean(0), atol=1e-5)


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


class Named(nn.Module):
    """Calls its layers with their argument by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(input=self.conv(input=x)).flatten(1)


def test_layers_may_be_called_by_the_name_of_their_argument():
    net = Named().eval()
    twin = nn.Sequential(net.conv, net.norm, nn.Flatten())
    named = gather_moments(net, make_data(), ["conv"], images=IMAGES, generator=generator())["conv"]
    usual = gather_moments(twin, make_data(), ["0"], images=IMAGES, generator=generator())["0"]
    assert torch.equal(named.inputs, usual.inputs)


@pytest.mark.parametrize(
    ("grown", "name", "told"),
    [("second", "first", "the gradients that come back to first"), ("norm", "second", "what enters second")],
)
def test_what_float32_does_not_hold_is_told_by_the_layer(grown, name, told):
    broken = Net().eval()
    with torch.no_grad():
        broken.get_submodule(grown).weight.mul_(1e25)
    with pytest.raises(ModelError, match=rf"^{told} .* can't be held in float32, .*: pass a trained checkpoint"):
        gather_moments(broken, make_data(), [name], images=IMAGES, generator=generator())


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
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


class Cut(nn.Module):
    """Layers before and behind a place that no gradient passes, as tokens, frozen parts and in-place changes have."""

    def __init__(self, before, cut, behind=lambda self, x: self.last(x)):
        super().__init__()
        self.first, self.last = nn.Linear(60, 6), nn.Linear(6, 3)
        self.before, self.cut, self.behind = before, cut, behind

    def forward(self, x):
        return self.behind(self, self.cut(self.before(self, x.flatten(1))))


def without_gradients(self, x):
    with torch.no_grad():
        return self.first(x)


@pytest.mark.parametrize(
    ("before", "cut", "first_has"),
    [
        (lambda self, x: self.first(x), lambda h: h, True),
        (lambda self, x: self.first(x.mul_(2)), lambda h: h, True),
        (lambda self, x: self.first(x.long().float()), lambda h: h, True),
        (lambda self, x: self.first(x), lambda h: h.detach(), False),
        (without_gradients, lambda h: h, False),
        (lambda self, x: torch.stack([self.first(row) for row in x]), lambda h: h, True),
    ],
    ids=["nothing", "in place", "whole numbers", "detached", "no_grad", "vectors"],
)
def test_gradients_are_those_behind_whatever_stands_before(before, cut, first_has):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Cut(before, cut).eval()
    found = gather_moments(net, make_data(), ["first", "last"], images=IMAGES, generator=generator())
    assert (found["first"].outputs is not None) == first_has
    plain = Cut(lambda self, x: self.first(x), lambda h: h).eval()
    plain.load_state_dict(net.state_dict())
    whole = gather_moments(plain, make_data(), ["first", "last"], images=IMAGES, generator=generator())
    assert torch.equal(found["last"].outputs, whole["last"].outputs)
    if first_has:
        torch.testing.assert_close(found["first"].outputs, whole["first"].outputs)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert not net.first._forward_pre_hooks


def test_a_network_without_gradients_is_refused():
    for behind in (
        lambda self, h: self.last(h).argmax(1).float(),
        torch.inference_mode()(lambda self, h: self.last(h)),
    ):
        net = Cut(without_gradients, lambda h: h, behind).eval()
        with pytest.raises(ModelError, match="have no gradient by those of its layers, so it can't be trained"):
            gather_moments(net, make_data(), ["first", "last"], images=IMAGES, generator=generator())


# Convolutions of every rank and grouping: the 60 numbers of an image are viewed in the shape that the layer takes.

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
CONVOLUTIONS = {
    "1-d": ((2, 30), nn.Conv1d(2, 4, 3, stride=2, dilation=3, padding=2, padding_mode="circular")),
    "1-d, even, the same": ((4, 15), nn.Conv1d(4, 6, 4, padding="same", dilation=3, groups=2, padding_mode="reflect")),
    "3-d": ((2, 3, 2, 5), nn.Conv3d(2, 3, (2, 2, 3), stride=(1, 1, 2), padding=(1, 0, 1), dilation=(2, 1, 1))),
    "3-d, grouped": ((4, 3, 1, 5), nn.Conv3d(4, 6, (2, 1, 3), groups=2, padding=(0, 0, 1), padding_mode="replicate")),
    "grouped": ((6, 2, 5), nn.Conv2d(6, 9, (2, 3), groups=3, padding=(1, 2), stride=(1, 2), dilation=(1, 2))),
    "depthwise": ((5, 3, 4), nn.Conv2d(5, 10, 3, groups=5, padding=1, padding_mode="reflect")),
    "strided depthwise": ((5, 3, 4), nn.Conv2d(5, 5, 3, groups=5, padding=1, stride=2)),
}


def padded(data, conv):
    """Pad by numpy, which knows nothing of torch's padding."""
    if conv.padding == "same":
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        widths = [(span // 2, span - span // 2) for span in spans]
    else:
        widths = [(width, width) for width in conv.padding]
    return np.pad(data.double().numpy(), ((0, 0), (0, 0), *widths), mode=MODES[conv.padding_mode])


def grouped_patches(data, conv, step=None, offset=None):
    """Every input patch by a loop over outputs, (groups, examples · positions, C / groups · extent).

    With a step and an offset for each axis only those of that grid.
    """
    data = padded(data, conv)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(data.shape[2:], spans, conv.stride, strict=True)]
    channels = conv.in_channels // conv.groups
    groups = []
    for group in range(conv.groups):
        rows = []
        for place in product(*map(range, counts)):
            if step is not None and any((p - o) % step or p < o for p, o in zip(place, offset, strict=True)):
                continue
            taps = [
                [p * s + tap * d for tap in range(k)]
                for p, s, d, k in zip(place, conv.stride, conv.dilation, conv.kernel_size, strict=True)
            ]
            own = data[:, group * channels : (group + 1) * channels]
            rows.append(own[np.ix_(range(len(own)), range(channels), *taps)].reshape(len(own), -1))
        groups.append(np.concatenate(rows))
    return torch.from_numpy(np.stack(groups)).float()


def second_moment(patches, centred):
    """Return the mean over groups of their second moments, each about its own mean."""
    means = patches.mean(1, keepdim=True) * centred
    return torch.stack([rows.T @ rows / len(rows) for rows in patches - means]).mean(0)


@pytest.fixture(autouse=True, scope="module")
def _drawn():
    draws = torch.Generator().manual_seed(0)
    for _, conv in CONVOLUTIONS.values():
        for parameter in conv.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws)


def around(shape, conv, norm=None):
    """Return a network in which the layer called 2 is a convolution, and then perhaps a batch norm."""
    outputs = conv(torch.zeros(1, *shape)).numel()
    after = [] if norm is None else [norm]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(outputs, 3)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape), conv, *after, nn.Flatten(), nn.Tanh(), head).eval()


def moments_of(net, name="2", images=IMAGES):
    return gather_moments(net, make_data(), [name], images=images, generator=generator())[name]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_inputs_of_a_convolution_equal_a_loop_over_groups_and_outputs(case):
    shape, conv = CONVOLUTIONS[case]
    net = around(shape, conv)
    moments = moments_of(net)
    patches = grouped_patches(seen_inputs(net, "2"), conv)
    assert moments.inputs.shape == (conv.weight[0].numel(),) * 2
    assert torch.allclose(moments.inputs, second_moment(patches, centred=True), atol=1e-5)
    assert torch.allclose(moments.mean, patches.mean(1), atol=1e-5)


@pytest.mark.parametrize("case", ["1-d", "3-d, grouped", "depthwise"])
def test_without_a_bias_a_batch_norm_behind_takes_up_the_means_of_groups(case):
    shape, conv = CONVOLUTIONS[case]
    kind = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[conv.weight.ndim]
    for norm, centred in ((kind(conv.out_channels), True), (None, False)):
        net = around(shape, without_bias(conv), norm)
        moments = moments_of(net)
        patches = grouped_patches(seen_inputs(net, "2"), conv)
        assert torch.allclose(moments.inputs, second_moment(patches, centred), atol=1e-5)
        assert moments.mean is None


def without_bias(conv):
    twin = type(conv)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        bias=False,
    )
    twin.load_state_dict({"weight": conv.weight.detach().clone()})
    return twin


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_gradients_of_a_convolution_equal_a_loop_over_examples_and_positions(case):
    shape, conv = CONVOLUTIONS[case]
    net = around(shape, conv)
    draws = generator()
    inputs, _ = next(iter(make_data().train_batches(IMAGES, generator=draws)))
    produced = net[:3](inputs)
    outputs = net[3:](produced)
    direction = torch.randn(outputs.shape, generator=draws)
    gradients = torch.autograd.grad(outputs, produced, direction)[0].double()
    expected = torch.zeros(conv.out_channels, conv.out_channels, dtype=torch.float64)
    for example in gradients:
        for place in product(*map(range, example.shape[1:])):
            row = example[(slice(None), *place)]
            expected += torch.outer(row, row) / len(gradients)
    group = torch.arange(conv.out_channels) // (conv.out_channels // conv.groups)
    expected[group[:, None] != group[None]] = 0
    found = moments_of(net).outputs
    assert torch.allclose(found.double(), expected, atol=1e-4 * float(expected.diagonal().max()))
    assert not found[group[:, None] != group[None]].any()


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_on_a_coarser_grid_the_patches_are_those_of_one_grid(case, monkeypatch):
    shape, conv = CONVOLUTIONS[case]
    net = around(shape, conv)
    positions = net[:3](torch.zeros(1, 60)).shape[2:]
    most = prod(positions) * conv.groups * IMAGES // 3
    monkeypatch.setattr(grids, "_MOST", most)
    moments = moments_of(net)
    inputs = seen_inputs(net, "2")
    matches = []
    for step in range(2, max(positions) + 1):
        for offset in product(*(range(min(step, n)) for n in positions)):
            patches = grouped_patches(inputs, conv, step, offset)
            if torch.allclose(moments.mean, patches.mean(1), atol=1e-5):
                assert torch.allclose(moments.inputs, second_moment(patches, centred=True), atol=1e-5)
                matches.append((step, prod(ceil((n - o) / step) for n, o in zip(positions, offset, strict=True))))
    assert matches
    # the grids that an axis shorter than the step can't tell apart have as many positions
    assert {count for _, count in matches} == {matches[0][1]}
    assert min(step for step, _ in matches) <= ceil(3 ** (1 / len(positions)))


def test_patches_in_chunks_are_the_same(monkeypatch):
    shape, conv = CONVOLUTIONS["grouped"]
    net = around(shape, conv)
    whole = moments_of(net)
    monkeypatch.setattr(grids, "_CHUNK", 1)
    parts = moments_of(net)
    assert torch.allclose(whole.inputs, parts.inputs, atol=1e-5)
    assert torch.allclose(whole.mean, parts.mean, atol=1e-5)


@pytest.mark.parametrize("case", ["1-d, even, the same", "3-d", "grouped"])
def test_examples_one_by_one_without_a_batch_are_the_same(case):
    class OneByOne(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return torch.stack([self.conv(example) for example in x])

    shape, conv = CONVOLUTIONS[case]
    expected, found = moments_of(around(shape, conv)), moments_of(around(shape, OneByOne(conv)), "2.conv")
    for one, other in ((expected.inputs, found.inputs), (expected.outputs, found.outputs), (expected.mean, found.mean)):
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        ("depthwise", SeKronSpec(((10, 1, 3, 1), (1, 1, 1, 3)), (1,))),
        ("grouped", SeKronSpec(((9, 1, 1, 3), (1, 2, 2, 1)), (1,))),
        ("1-d", SeKronSpec(((4, 1, 1), (1, 1, 3), (1, 2, 1)), (1, 1))),
        ("3-d, grouped", SeKronSpec(((2, 2, 2, 1, 1), (3, 1, 1, 1, 3)), (1,))),
    ],
)
def test_the_bias_keeps_the_mean_output_of_every_channel(case, spec):
    shape, conv = CONVOLUTIONS[case]
    net = around(shape, conv)
    small = factorise(conv, spec, Metric(moments_of(net)))
    inputs = seen_inputs(net, "2")
    dims = (0, *range(2, conv.weight.ndim))
    with torch.no_grad():
        kept, lost = small(inputs).mean(dims), (small(inputs) - conv(inputs)).square().mean(dims)
        assert torch.allclose(kept, conv(inputs).mean(dims), atol=1e-4)
    assert float(lost.max()) > 1e-2, "a spec that loses nothing tells nothing"
