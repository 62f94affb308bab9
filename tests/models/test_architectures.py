"""Networks in the style of those that users bring: what can be replaced in them, what that costs and what it computes.

Each is small, and built of the parts that make its kind of network what it is.
"""

import contextlib
import copy
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kronsearch as ks
from kronsearch.models.apply import apply_plan, load_compressed, save_compressed
from kronsearch.plan import Cost, Decomposition, LayerPlan, ModelIdentity, Plan, PlanBudget, Provenance, fingerprint
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.space import SearchSpace
from kronsearch.sekron import SeKronLinear, SeKronSpec, count_macs, factor_pairs
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.sekron.layers import SeKronLayer

SPACE = SearchSpace(deep_fits=2)  # the default one with fewer fits
KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def unit(conv, norm):
    return nn.Sequential(conv, norm(conv.out_channels), nn.ReLU(inplace=True))


class Inception3d(nn.Module):
    """Four branches of a video network (I3D: Carreira and Zisserman, 2017), concatenated."""

    def __init__(self, channels, one, three, five, pooled):
        super().__init__()
        norm = nn.BatchNorm3d
        self.one = unit(nn.Conv3d(channels, one, 1, bias=False), norm)
        self.three = nn.Sequential(
            unit(nn.Conv3d(channels, three // 2, 1, bias=False), norm),
            unit(nn.Conv3d(three // 2, three, 3, padding=1, bias=False), norm),
        )
        self.five = nn.Sequential(
            unit(nn.Conv3d(channels, five // 2, 1, bias=False), norm),
            unit(nn.Conv3d(five // 2, five, (1, 5, 5), padding=(0, 2, 2), bias=False), norm),
        )
        self.pooled = nn.Sequential(
            nn.MaxPool3d(3, 1, padding=1), unit(nn.Conv3d(channels, pooled, 1, bias=False), norm)
        )

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class I3D(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = unit(nn.Conv3d(3, 8, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False), nn.BatchNorm3d)
        self.first = Inception3d(8, 4, 8, 4, 4)
        self.second = Inception3d(20, 6, 12, 6, 4)
        self.logits = nn.Conv3d(28, 5, 1)

    def forward(self, x):
        x = F.max_pool3d(self.stem(x), (1, 3, 3), (1, 2, 2), padding=(0, 1, 1))
        x = F.max_pool3d(self.first(x), 2, 2)
        return self.logits(F.adaptive_avg_pool3d(self.second(x), (None, 1, 1))).mean((2, 3, 4))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        wide = inputs * expand
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            depthwise,
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNet(nn.Module):
    """Inverted residuals (MobileNetV2: Sandler et al., 2018)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            unit(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d),
            InvertedResidual(8, 8, 1, 3),
            InvertedResidual(8, 12, 2, 4),
            InvertedResidual(12, 12, 1, 4),
            unit(nn.Conv2d(12, 32, 1, bias=False), nn.BatchNorm2d),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 10))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """Scales channels by what a small network makes of their means, of linear layers or of 1×1 convolutions."""

    def __init__(self, channels, linear):
        super().__init__()
        self.linear = linear
        make = nn.Linear if linear else lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)
        self.down, self.up = make(channels, channels // 4), make(channels // 4, channels)

    def forward(self, x):
        means = F.adaptive_avg_pool2d(x, 1)
        scale = self.up(F.relu(self.down(means.flatten(1) if self.linear else means))).sigmoid()
        return x * scale.reshape(*x.shape[:2], 1, 1)


class SEBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, linear):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.excite = SqueezeExcitation(outputs, linear)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(
            self.excite(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))) + self.shortcut(x)
        )


class SEResNet(nn.Module):
    """Residual blocks with squeeze and excitation (Hu et al., 2018)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(SEBlock(8, 8, 1, linear=True), SEBlock(8, 16, 2, linear=False))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class SuperResolution(nn.Module):
    """Convolutions at the low resolution, a pixel shuffle, a global residual (as EDSR: Lim et al., 2017)."""

    def __init__(self, scale=2):
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect"), nn.PReLU(), nn.Conv2d(12, 12, 3, padding=1)
            )
            for _ in range(2)
        )
        self.tail = nn.Sequential(nn.Conv2d(12, 3 * scale**2, 5, padding="same"), nn.PixelShuffle(scale))

    def forward(self, x):
        features = self.head(x)
        for block in self.body:
            features = features + 0.1 * block(features)
        return self.tail(features) + F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)


class GatedBlock(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.filter = nn.Conv1d(channels, channels, 3, padding="same", dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 4, padding="same", dilation=dilation)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        return x + self.out(torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x)))


class Audio(nn.Module):
    """Gated dilated convolutions of one axis (as WaveNet: van den Oord et al., 2016)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, 12, 9, stride=4, padding=4, padding_mode="reflect")
        self.blocks = nn.Sequential(*(GatedBlock(12, 2**i) for i in range(3)))
        self.separable = nn.Sequential(
            nn.Conv1d(12, 12, 5, padding=2, groups=12, padding_mode="circular"), nn.Conv1d(12, 20, 1)
        )
        self.head = nn.Linear(20, 6)

    def forward(self, x):
        x = self.separable(self.blocks(self.stem(x)))
        return self.head(F.gelu(x).transpose(1, 2)).mean(1)


class ResNeXt(nn.Module):
    """Grouped convolutions between 1×1 ones (Xie et al., 2017), their channels shuffled once."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(6, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.dilated = nn.Conv2d(24, 24, (3, 2), padding=(2, 0), dilation=2, groups=8)
        self.up = nn.Conv2d(24, 8, 1, groups=2)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(F.relu(self.down(x)))))
        return self.up(F.channel_shuffle(self.dilated(x), 8)).flatten(1)


class Decoder(nn.Module):
    """An encoder and a decoder of transposed convolutions, with a skip (U-Net: Ronneberger et al., 2015)."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.leave = nn.Conv2d(16, 8, 3, padding=1)
        self.final = nn.ConvTranspose2d(8, 2, 3, padding=1, groups=2)

    def forward(self, x):
        skip = F.silu(self.enter(x))
        x = self.up(F.silu(self.down(skip)))
        return self.final(F.silu(self.leave(torch.cat([x, skip], 1))))


class Asking(nn.Module):
    """A network that asks its layers for their sizes when it runs (DaViT: Ding et al., 2022)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 12, (4, 3), stride=(2, 3), padding=1)
        self.mix = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        down, right = self.embed.stride
        x = F.relu(self.embed(F.pad(x, (0, -x.shape[3] % right, 0, -x.shape[2] % down))))
        x = x + self.mix(x) / (self.mix.kernel_size[0] * self.mix.groups)
        return self.head(x.mean((2, 3)).reshape(-1, self.head.in_features)) / self.head.out_features


NETWORKS = {  # the network, its input, the layers that must stay dense
    "I3D": (I3D, (3, 4, 16, 12), {}),
    "MobileNetV2": (MobileNet, (3, 16, 12), {}),
    "SE-ResNet": (SEResNet, (3, 8, 6), {}),
    "super-resolution": (SuperResolution, (3, 7, 6), {}),
    "audio": (Audio, (1, 65), {}),
    "ResNeXt": (ResNeXt, (6, 9, 8), {}),
    "asking": (Asking, (2, 9, 10), {}),
    "decoder": (Decoder, (2, 6, 8), {"up": "transposed convolution", "final": "transposed convolution"}),
}
all_networks = pytest.mark.parametrize("name", NETWORKS)
# of the dense network, and of what `to_conv` gives: a factorised layer itself pads without a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@cache
def make(name):
    """Return a network in float64 and eval mode, batch norms with statistics of their own, and its cost.

    No test changes it: what is made of it is a copy.
    """
    kind, input_shape, _ = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval(), ks.profile_model(model, input_shape=input_shape)


def inputs_of(name, examples=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, *NETWORKS[name][1], dtype=torch.float64, generator=generator)


def kernels(cost):
    return [layer for layer in cost.layers if layer.kernel_shape is not None]


def plan_of(cost, specs):
    layers = {
        layer.name: LayerPlan(
            kernel_shape=layer.kernel_shape,
            spec=specs.get(layer.name),
            dense=None if layer.name in specs else layer.keeps_dense or "nothing costs less",
        )
        for layer in kernels(cost)
    }
    dense = Cost(macs=cost.macs, params=cost.params)
    return Plan(
        model=ModelIdentity(spec=None, fingerprint=fingerprint(layers)),
        input_shape=cost.input_shape,
        budget=PlanBudget(flops="50%"),
        dense=dense,
        compressed=dense,
        layers=layers,
        decomposition=Decomposition(),
        predicted_error=0.0,
        provenance=Provenance(versions={}, seed=0),
    )


@cache
def candidates_of(name):
    model, cost = make(name)
    layers = [layer for layer in kernels(cost) if layer.keeps_dense is None]
    return [layer_candidates(model.get_parameter(f"{layer.name}.weight"), layer, SPACE) for layer in layers]


def chosen_specs(name, which):
    """Choose for every layer that can be replaced its cheapest candidate, or a middle one of each structure in turn."""
    specs = {}
    for turn, candidates in enumerate(candidates_of(name)):
        order = np.argsort(candidates.macs[1:], kind="stable") + 1
        if which == "middle":
            structures = candidates.structures()
            present = sorted(set(structures[1:]))
            order = order[structures[order] == present[turn % len(present)]]
        specs[candidates.name] = candidates.spec(int(order[0 if which == "cheapest" else len(order) // 2]))
    return specs


@pytest.fixture(scope="module", params=[f"{name} {which}" for name in NETWORKS for which in ("cheapest", "middle")])
def replaced(request):
    """Return a network, its cost, specs for its layers, and the network that they make of it."""
    name, which = request.param.split()
    model, cost = make(name)
    specs = chosen_specs(name, which)
    return name, model, cost, specs, apply_plan(model, plan_of(cost, specs))


def densified(small):
    """Return a copy with every factorised layer formed to a dense one."""
    small = copy.deepcopy(small)
    for name, layer in list(small.named_modules()):
        if isinstance(layer, SeKronLayer):
            small.set_submodule(name, layer.to_linear() if isinstance(layer, SeKronLinear) else layer.to_conv())
    return small


@all_networks
def test_every_kernel_is_replaceable_or_has_a_reason(name):
    model, cost = make(name)
    owners = {n for n, module in model.named_modules() if isinstance(module, KERNELS)}
    assert {layer.name for layer in kernels(cost)} == owners
    reasons = {layer.name: layer.keeps_dense for layer in kernels(cost) if layer.keeps_dense is not None}
    assert reasons == NETWORKS[name][2]
    for layer in kernels(cost):
        assert (layer.geometry is None) == (layer.name in reasons)
        assert layer.kernel_macs == (0 if layer.name in reasons else layer.macs)


def test_a_transposed_convolution_in_a_plan_is_refused_by_name():
    model, cost = make("decoder")
    plan = plan_of(cost, {"up": SeKronSpec(((16, 1, 1, 1), (1, 8, 2, 2)), (1,))})
    with pytest.raises(ks.errors.PlanError, match=r"replaces 'up' .* the model has a ConvTranspose2d"):
        apply_plan(model, plan)


def test_every_layer_without_a_reason_is_replaced(replaced):
    _, _, cost, specs, small = replaced
    assert set(specs) == {layer.name for layer in kernels(cost) if layer.keeps_dense is None}
    assert all(isinstance(small.get_submodule(n), SeKronLayer) for n in specs)


def test_outputs_are_those_of_the_formed_kernels(replaced):
    name, model, _, _, small = replaced
    inputs = inputs_of(name)
    with torch.no_grad():
        found, expected = small(inputs), densified(small)(inputs)
        assert found.shape == model(inputs).shape
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        with kernels_formed(small):
            assert torch.allclose(small(inputs), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, model(inputs), rtol=1e-3, atol=1e-3), "a plan that changes nothing"


def test_outputs_in_float32_and_in_the_layout_for_images(replaced):
    name, _, _, _, small = replaced
    inputs = inputs_of(name)
    with torch.no_grad():
        expected = small(inputs)
        single = copy.deepcopy(small).float()
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        layout = layouts.get(inputs.ndim, torch.contiguous_format)
        found = single.to(memory_format=layout)(inputs.float().contiguous(memory_format=layout))
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_three_counts_agree(replaced):
    name, model, cost, specs, small = replaced
    found = ks.profile_model(small, input_shape=cost.input_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(inputs_of(name, examples=1))
    by_torch = counter.get_flop_counts()
    total = 0
    for layer in kernels(cost):
        spec = specs.get(layer.name)
        if spec is None:
            closed = layer.macs
        else:
            closed = sum(count_macs(spec, layer.geometry, call) for call in layer.calls)
            own = sum(parameter.numel() for parameter in small.get_submodule(layer.name).parameters())
            assert own == layer.params - layer.kernel_params + spec.params
        assert found.layer(layer.name).macs == closed, layer.name
        assert sum(by_torch[f"{type(model).__name__}.{layer.name}"].values()) == 2 * closed, layer.name
        total += closed
    assert counter.get_total_flops() == 2 * total
    saved = sum(layer.kernel_params - specs[layer.name].params for layer in kernels(cost) if layer.name in specs)
    assert found.params == cost.params - saved == sum(parameter.numel() for parameter in small.parameters())


def full_rank(layer, turn):
    """Return a spec that loses nothing, of another pair of factors for each layer."""
    pairs = [pair for pair in factor_pairs(layer.kernel_shape) if pair[0][0] % layer.geometry.groups == 0]
    pair = pairs[11 * turn % len(pairs)]
    return SeKronSpec(pair, (min(map(prod, pair)),))


@all_networks
def test_full_rank_gives_the_outputs_of_the_dense_network(name):
    model, cost = make(name)
    layers = [layer for layer in kernels(cost) if layer.keeps_dense is None]
    specs = {layer.name: full_rank(layer, turn) for turn, layer in enumerate(layers)}
    small = apply_plan(model, plan_of(cost, specs))
    inputs = inputs_of(name)
    with torch.no_grad():
        assert torch.allclose(small(inputs), model(inputs), rtol=1e-9, atol=1e-9)


def gradients(small, inputs, train, within=contextlib.nullcontext):
    small = copy.deepcopy(small).train(train)
    with within(small):
        small(inputs).square().mean().backward()
    return {name: parameter.grad for name, parameter in small.named_parameters()}


@pytest.mark.parametrize("train", [False, True])
def test_gradients_reach_all_factors_and_are_those_of_formed_kernels(replaced, train):
    name, _, _, specs, small = replaced
    inputs = inputs_of(name, examples=3)
    found = gradients(small, inputs, train)
    formed = gradients(small, inputs, train, kernels_formed)
    for key, gradient in found.items():
        assert gradient is not None, key
        assert bool(gradient.isfinite().all()), key
        # a gradient that batch norm makes zero is rounding
        assert torch.allclose(gradient, formed[key], rtol=1e-6, atol=1e-9 * (1 + float(gradient.abs().max()))), key
    for layer, spec in specs.items():
        for k in range(spec.sequence_length):
            assert f"{layer}.factors.{k}" in found


def test_a_step_of_training_lowers_the_loss(replaced):
    name, _, _, _, small = replaced
    small, inputs = copy.deepcopy(small).train(), inputs_of(name, examples=3)
    target = small(inputs).detach() + 1
    optimiser = torch.optim.SGD(small.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(small(inputs), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_a_compressed_network_is_saved_and_loaded(replaced, tmp_path):
    name, model, cost, specs, small = replaced
    save_compressed(small, plan_of(cost, specs), tmp_path / "small.safetensors")
    again = load_compressed(model, tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(again(inputs_of(name)), small(inputs_of(name)))


@pytest.mark.parametrize("name", ["MobileNetV2", "I3D"])
def test_a_whole_search_keeps_the_budget_and_lists_every_layer(name):
    model, cost = make(name)
    result = ks.search(copy.deepcopy(model).float(), None, budget=ks.Budget(params="60%"), input_shape=cost.input_shape)
    found = ks.profile_model(result.model, input_shape=cost.input_shape)
    assert found.params <= cost.params * 6 // 10
    assert found.macs <= cost.macs
    assert (found.macs, found.params) == (result.plan.compressed.macs, result.plan.compressed.params)
    assert list(result.plan.layers) == [layer.name for layer in kernels(cost)]
    assert result.plan.replaced
    for layer in kernels(cost):
        assert result.plan.layers[layer.name].kernel_shape == layer.kernel_shape
    with torch.no_grad():
        outputs = result.model(inputs_of(name).float())
    assert bool(outputs.isfinite().all())
