"""Each reason to keep a layer dense, on the smallest network that has it."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from kronsearch.errors import ModelError
from kronsearch.models.profile import profile_model


class Wrapped(nn.Module):
    """A conv and whatever a test does around it."""

    def __init__(self, conv, use=lambda self, x: self.conv(x)):
        super().__init__()
        self.conv = conv
        self.use = use

    def forward(self, x):
        return self.use(self, x)


class SameConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class ComplexIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Linear(3, 4, dtype=torch.complex64)

    def forward(self, x):
        return self.conv(x.to(torch.complex64)).real


def reason(model, name="conv", input_shape=(4, 8, 8)):
    return profile_model(model, input_shape=input_shape).layer(name).keeps_dense


def own_forward():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias)
    return conv


def hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


def pruned():
    return prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", amount=0.5)


def test_a_model_that_is_a_layer_itself_can_not_be_replaced():
    assert reason(nn.Linear(8, 4), "", input_shape=(8,)).startswith("the model itself")


def test_plain_layers_can_be_replaced():
    assert reason(Wrapped(nn.Conv2d(4, 4, 3, stride=2, padding="valid", dilation=2, bias=False))) is None
    assert reason(Wrapped(nn.Linear(8, 4))) is None
    assert reason(Wrapped(nn.Conv2d(4, 4, 3, padding=1), lambda self, x: self.conv(self.conv(x)))) is None


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "transposed convolution"),
        (SameConv(4, 4, 3), "SameConv is a Conv2d with code of its own"),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), None),
        (pruned(), "weight is computed from others (weight norm, pruning)"),
        (own_forward(), "forward is replaced on the instance"),
        (hooked(), "has forward hooks"),
        (nn.PReLU(4), "PReLU is neither a convolution nor Linear"),
    ],
)
def test_kinds_of_layers(layer, expected):
    if expected is None:  # the parametrization's own modules hold the parameters, the layer runs the convolution
        expected = "parametrized weight"
    assert reason(Wrapped(layer)) == expected


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_convolutions_of_every_rank_and_grouping_can_be_replaced(kind, axes, groups):
    layer = Wrapped(kind(4, 8, 3, groups=groups))
    assert reason(layer, input_shape=(4, *(5,) * axes)) is None
    assert reason(Wrapped(nn.Sequential(layer)), "conv.0.conv", input_shape=(4, *(5,) * axes)) is None


@pytest.mark.parametrize(("kind", "axes"), [(nn.ConvTranspose1d, 1), (nn.ConvTranspose3d, 3)])
def test_transposed_convolutions_of_other_ranks(kind, axes):
    assert reason(Wrapped(kind(4, 4, 3)), input_shape=(4, *(5,) * axes)) == "transposed convolution"


class MadeOtherwise(nn.Conv3d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1, groups=2)
        self.made = True

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    @staticmethod
    def stride_of(other):
        return other, other


def convolves_by_itself(name, value):
    return type("Odd", (nn.Conv2d,), {name: value})(4, 4, 3)


def test_a_subclass_that_runs_as_its_base_can_be_replaced():
    assert reason(Wrapped(MadeOtherwise(4)), input_shape=(4, 2, 2, 2)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", lambda self, x: F.conv2d(x, self.weight)),
        ("_conv_forward", lambda self, x, weight, bias: F.conv2d(x, 2 * weight, bias)),
        ("__call__", lambda self, x: 2 * self.forward(x)),
        ("train", lambda self, mode=True: self),
    ],
)
def test_a_subclass_with_code_of_its_own_is_left_as_it_is(name, value):
    assert reason(Wrapped(convolves_by_itself(name, value))) == "Odd is a Conv2d with code of its own"
    class_of_it = type(convolves_by_itself(name, value))
    assert reason(Wrapped(type("Odder", (class_of_it,), {})(4, 4, 3))) == "Odder is a Conv2d with code of its own"


def test_a_video_network_of_torchvision():
    video = pytest.importorskip("torchvision.models.video")
    cost = profile_model(video.r3d_18(), input_shape=(3, 4, 16, 16))
    assert {layer.keeps_dense for layer in cost.layers if layer.kernel_shape} == {None}
    assert cost.layer("layer1.0.conv1.0").kind == "Conv3DSimple"


def test_complex_weight():
    assert reason(ComplexIn(), input_shape=(3,)) == "weight is complex64, not floating point"


def test_lazy_layer_after_its_first_call():
    model = Wrapped(nn.LazyConv2d(4, 3))
    model(torch.zeros(1, 4, 8, 8))
    assert reason(model) is None


def test_weight_shared_by_two_layers():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach())  # another Parameter on the same memory
    assert reason(model, "0") == "weight is shared with 2"
    assert reason(model, "2") == "weight is shared with 0"
    assert reason(model, "1") is None


def test_a_bias_shared_by_two_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    cost = profile_model(model, input_shape=(4,))
    assert cost.layer("0").keeps_dense == "bias is shared with 1"
    assert cost.layer("1").keeps_dense == "bias is shared with 0"


def test_weight_in_a_list_of_parameters():
    model = Wrapped(nn.Conv2d(4, 4, 3))
    model.decayed = nn.ParameterList([model.conv.weight])
    assert reason(model) == "weight is shared with decayed"


def test_a_layer_that_holds_more_than_its_kernel_and_bias():
    for name, kept in (("adapter", nn.Linear(2, 2)), ("scale", nn.Parameter(torch.ones(1)))):
        conv = nn.Conv2d(4, 4, 3)
        setattr(conv, name, kept)
        assert reason(Wrapped(conv)) == "holds modules, parameters or buffers beside its weight and bias"


def test_weight_shared_with_an_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x.long()))

    assert reason(Tied(), "head", (5,)) == "weight is shared with embed"


def test_module_registered_twice():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    model.add_module("again", model[0])
    cost = profile_model(model, input_shape=(4, 8, 8))
    layer = cost.layer("0")
    assert layer.calls == ((8, 8), (6, 6))
    assert layer.keeps_dense is None
    assert [layer.name for layer in cost.layers] == ["0"]


def keeps(conv, call):
    model = Wrapped(conv)
    model.use = call(model)
    return model


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_a_network_whose_copies_run_its_own_layers_is_refused(again):
    """What is compressed is a copy: it would go on with the dense layers, and with whatever they learn."""
    model = keeps(nn.Conv2d(4, 4, 3), lambda model: lambda _, x: model.conv(x))
    with pytest.raises(ModelError, match=r"^Wrapped calls conv by a reference that a copy of it keeps"):
        reason(model)
    kept = keeps(nn.Conv2d(4, 4, 3), lambda model: functools.partial(lambda conv, _, x: conv(x), model.conv))
    assert reason(again(kept)) is None


def test_weight_used_without_the_layer():
    conv = nn.Conv2d(4, 4, 3)
    assert reason(nn.Sequential(nn.ReLU(), Wrapped(conv, lambda self, x: F.conv2d(x, self.conv.weight))), "1.conv") == (
        "not called, its weight is used by 1"
    )
    assert reason(Wrapped(conv, lambda self, x: self.conv.forward(x))) == (
        "not called, its weight is used by the model itself"
    )
    assert reason(Wrapped(conv, lambda self, x: self.conv(x) + self.conv.weight.sum())) == (
        "weight is also used by the model itself"
    )
    assert reason(Wrapped(conv, lambda self, x: self.conv(x.to(self.conv.weight.dtype)))) == (
        "weight is also used by the model itself"
    )
    assert reason(Wrapped(conv, lambda self, x: x.relu())) == "not called"


def test_projections_of_multi_head_attention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    cost = profile_model(Attends(), input_shape=(5, 8))
    assert cost.layer("attention.out_proj").keeps_dense is not None
    assert cost.layer("attention").keeps_dense == "MultiheadAttention is neither a convolution nor Linear"
    assert cost.macs == cost.layer("attention").macs


def test_layers_of_timm_with_their_own_padding():
    timm = pytest.importorskip("timm")
    cost = profile_model(timm.create_model("tf_efficientnet_lite0"), input_shape=(3, 64, 64))
    reasons = {layer.keeps_dense for layer in cost.layers if layer.kernel_shape}
    assert reasons == {None, "Conv2dSame is a Conv2d with code of its own"}


def test_the_linear_layer_of_timm_is_one():
    """It holds a third to two thirds of the parameters of timm's small MobileNets and EfficientNets."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=16).eval()
    assert type(model.classifier) is not nn.Linear
    layer = profile_model(model, input_shape=(3, 64, 64)).layer("classifier")
    assert layer.keeps_dense is None

    class Doubled(type(model.classifier)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.classifier = Doubled(model.classifier.in_features, 16)
    layer = profile_model(model, input_shape=(3, 64, 64)).layer("classifier")
    assert layer.keeps_dense == "Doubled is a Linear with code of its own"
