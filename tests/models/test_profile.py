"""The profiler: formulas of layers, torch's counter as the second opinion, and a model left as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kronsearch.errors import ModelError
from kronsearch.models.profile import ModelCost, profile_model
from kronsearch.models.zoo.cifar_resnet import cifar_resnet20


def torch_macs(model, input_shape):
    """By torch's dispatcher, module by module."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *input_shape))
    root = type(model).__name__
    return {
        name.removeprefix(f"{root}."): sum(n.values()) // 2
        for name, n in counter.get_flop_counts().items()
        if name not in ("Global", root)
    }


def conv_macs(f, c, k, h, w):
    return f * c * k * k * h * w


class Small(nn.Module):
    """One of each: strided, dilated, grouped and transposed convolution, a layer called twice, one never called."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.token = nn.Linear(4, 6)
        self.unused = nn.Linear(5, 7)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.strided(x)
        x = self.dilated(self.norm(self.dilated(x)))
        x = self.up(self.grouped(x))
        x = self.token(x.flatten(2).transpose(1, 2))
        return self.head(F.relu(x).mean(1))


@pytest.fixture(scope="module")
def cost() -> ModelCost:
    return profile_model(Small(), input_shape=(3, 9, 13))


def test_layers_cost_what_their_formulas_say(cost):
    h, w = 5, 7
    expected = {
        "strided": conv_macs(8, 3, 3, h, w),
        "dilated": 2 * conv_macs(8, 8, 3, h, w),
        "norm": 2 * 8 * h * w,  # fvcore: scale and shift
        "grouped": conv_macs(8, 8 // 4, 3, h, w),
        "up": 8 * h * w * 4 * 2 * 2,
        "token": 2 * h * 2 * w * 4 * 6,
        "head": 6 * 2,
        "unused": 0,
    }
    assert {layer.name: layer.macs for layer in cost.layers} == expected
    assert [layer.name for layer in cost.layers] == list(expected), "in the order of execution, the uncalled last"
    assert cost.macs == sum(expected.values())


def test_layers_agree_with_the_counter_of_torch(cost):
    other = torch_macs(Small(), (3, 9, 13))
    for layer in cost.layers:
        if layer.kernel_shape is not None and layer.calls:
            assert layer.macs == other[layer.name], layer.name


def test_calls_params_and_kernels(cost):
    by_name = {layer.name: layer for layer in cost.layers}
    assert by_name["strided"].calls == ((9, 13),)
    assert by_name["dilated"].calls == ((5, 7), (5, 7))
    assert by_name["token"].calls == ((10 * 14,),)
    assert by_name["head"].calls == ((1,),)
    assert by_name["unused"].calls == by_name["norm"].calls == ()
    assert by_name["strided"].params == 8 * 3 * 3 * 3 + 8
    assert by_name["dilated"].params == 8 * 8 * 3 * 3
    assert by_name["grouped"].kernel_shape == (8, 2, 3, 3)
    assert by_name["norm"].kernel_shape is None
    assert cost.params == sum(p.numel() for p in Small().parameters()) == sum(x.params for x in cost.layers)
    assert cost.input_shape == (3, 9, 13)


def test_a_convolution_on_folded_images_has_a_call_for_each():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.conv(x.transpose(0, 1)).mean()

    layer = profile_model(Folded(), input_shape=(5, 6, 8)).layer("conv")
    assert layer.calls == ((6, 8),) * 5
    assert layer.macs == 5 * conv_macs(4, 1, 3, 4, 6)


def test_a_layer_made_of_functional_convolutions_is_counted_under_its_name():
    class TwoStages(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(5, 3, 3, 1))
            self.b = nn.Parameter(torch.zeros(8, 5, 1, 3))

        def forward(self, x):
            return F.conv2d(F.conv2d(x, self.a), self.b)

    cost = profile_model(nn.Sequential(nn.ReLU(), TwoStages()), input_shape=(3, 6, 7))
    assert cost.layer("1").macs == cost.macs == 5 * 3 * 3 * 4 * 7 + 8 * 5 * 3 * 4 * 5
    assert cost.layer("1").keeps_dense == "TwoStages is neither a convolution nor Linear"


def test_a_parameter_with_two_owners_counts_once_in_the_total():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    cost = profile_model(model, input_shape=(4,))
    assert cost.params == 4 * 4
    assert [layer.params for layer in cost.layers] == [4 * 4, 4 * 4]


def test_cifar_resnet20():
    cost = profile_model(cifar_resnet20(), input_shape=(3, 32, 32))
    convs = conv_macs(16, 3, 3, 32, 32) + 6 * conv_macs(16, 16, 3, 32, 32)
    convs += conv_macs(32, 16, 3, 16, 16) + 5 * conv_macs(32, 32, 3, 16, 16)
    convs += conv_macs(64, 32, 3, 8, 8) + 5 * conv_macs(64, 64, 3, 8, 8)
    norms = 2 * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)
    pooling = 64 * 8 * 8
    assert cost.macs == convs + norms + pooling + 64 * 10
    assert cost.params == 269_722
    assert all(layer.keeps_dense is None for layer in cost.layers if layer.kernel_shape)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float64])
def test_the_input_has_the_type_of_the_parameters(half):
    assert profile_model(nn.Sequential(nn.Linear(4, 3)).to(half), input_shape=(4,)).macs == 4 * 3


def test_multi_head_attention_is_counted_in_full():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens, width, hidden = 5, 8, 16
    cost = profile_model(model, input_shape=(tokens, width))
    projections, attention = 4 * tokens * width * width, 2 * tokens * tokens * width
    assert cost.layer("self_attn").macs == projections + attention
    norms = 2 * 5 * tokens * width
    assert cost.macs == projections + attention + 2 * tokens * width * hidden + norms
    assert cost.layer("linear1").keeps_dense is None


class Remembers(nn.Module):
    """Modes of its own, hooks, a count of its calls, and a forward that can fail when traced."""

    def __init__(self, fails=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.fails = fails

    def forward(self, x):
        self.calls += 1
        if self.fails and torch.jit.is_tracing():
            raise RuntimeError("no tracing, please\nand more lines")
        return self.frozen(self.conv(x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Remembers(fails)
    model.train()
    model.frozen.eval()
    model.conv.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(ModelError, match=r"^the operators of Remembers can't be counted: RuntimeError: no tracing"):
            profile_model(model, input_shape=(3, 4, 4))
    else:
        profile_model(model, input_shape=(3, 4, 4))
    assert model.training
    assert not model.frozen.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == [0, 1, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def compiled_in_place():
    model = nn.Linear(4, 3)
    model.compile(backend="eager")
    return model


class NoModes(nn.Module):
    def eval(self):
        raise NotImplementedError("there is none")


class Kron(nn.Module):
    def forward(self, x):
        return torch.kron(x, x)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            (4, 8, 8),
            r"Conv2d can't run on an input of shape \(1, 4, 8, 8\): RuntimeError: .*3 chan",
        ),
        (nn.Conv2d(3, 4, 3), (), "is empty; give positive sizes"),
        (nn.Conv2d(3, 4, 3), (3, 0, 8), "is empty; give positive sizes"),
        (nn.LazyConv2d(4, 3), (3, 8, 8), "has lazy layers"),
        (nn.Linear(4, 3, device="meta"), (4,), "on the meta device"),
        (Kron(), (4,), "it runs kron in Kron"),
        (nn.ModuleDict({"a/b": nn.Linear(4, 3)}), (4,), "ModuleDict has a module named 'a/b': with a slash"),
        (
            torch.compile(nn.Linear(4, 3), backend="eager"),
            (4,),
            "OptimizedModule is compiled: pass the network as it was",
        ),
        (compiled_in_place(), (4,), r"Linear is compiled: .* or one whose compile\(\) was not called"),
        (torch.jit.ScriptModule(), (4,), "ScriptModule is a script: pass the network that it was made of"),
        (NoModes(), (4,), "NoModes has no eval mode: NotImplementedError: there is none"),
        ("zoo:digits", (4,), "a network is a torch.nn.Module, such as load_model returns, not of type str"),
    ],
)
def test_errors_are_one_line(model, shape, message):
    with pytest.raises(ModelError, match=message) as caught:
        profile_model(model, input_shape=shape)
    assert "\n" not in str(caught.value)


def test_layer_by_name(cost):
    assert cost.layer("strided").kind == "Conv2d"
    with pytest.raises(ModelError, match="has no layer 'stridet' with parameters or MACs: did you mean strided"):
        cost.layer("stridet")
    with pytest.raises(ModelError, match="it has 8 others"):
        cost.layer("qqqqqqqq")


@pytest.mark.parametrize(
    ("name", "size", "giga"),
    [("resnet18", 224, 1.82), ("googlenet", 224, 1.50), ("mobilenet_v2", 224, 0.31), ("shufflenet_v2_x0_5", 224, 0.04)],
)
def test_torchvision(name, size, giga):
    models = pytest.importorskip("torchvision.models")
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **kwargs)
    cost = profile_model(model, input_shape=(3, size, size))
    assert round(cost.macs / 1e9, 2) == giga
    assert cost.macs == sum(layer.macs for layer in cost.layers)
    other = torch_macs(model, (3, size, size))
    for layer in cost.layers:
        if layer.kernel_shape is not None and layer.calls:
            assert layer.macs == other[layer.name], layer.name
        elif layer.kernel_shape is not None:
            assert layer.name.startswith("aux")
            assert layer.keeps_dense == "not called"
