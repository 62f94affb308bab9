import pytest
import torch
from torch import nn

from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.probe import unfit_layers
from kronsearch.models.profile import profile_model
from kronsearch.sekron import SeKronSpec

X = torch.linspace(-1, 1, 6).reshape(1, 6)


class Pair(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.scale = 2.0
        self.use = use

    def forward(self, x):
        return self.use(self, self.b(x))


def reasons(use):
    cost = profile_model(Pair(use), input_shape=(6,))
    return [cost.layer(name).keeps_dense for name in ("a", "b")]


def test_layers_that_a_network_only_calls_can_be_factorised():
    assert reasons(lambda self, x: self.a(x)) == [None, None]
    assert unfit_layers(Pair(lambda self, x: self.a(x)), X, ["a", "b"]) == {}
    assert unfit_layers(nn.Identity(), X, []) == {}


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda self, x: self.a(x) * self.a.scale, "can't run with it factorised (AttributeError: 'SeKronLinear'"),
        (lambda self, x: self.a(x) if isinstance(self.a, nn.Linear) else x, "doesn't call it once it is factorised"),
    ],
    ids=["an attribute of its own", "by its class"],
)
def test_a_layer_that_the_network_asks_for_more_is_left_dense(use, told):
    first, second = reasons(use)
    assert told in first
    assert second is None


def test_layers_that_fail_together_only_are_all_left_dense():
    def use(self, x):
        assert isinstance(self.a, nn.Linear) or isinstance(self.b, nn.Linear), "one of two"
        return self.a(x)

    assert reasons(use) == ["the network can't run with it factorised (AssertionError: one of two)"] * 2


def test_parameters_are_not_copied_for_it():
    held = []

    def use(self, x):
        held.append(self.table)
        return self.a(x)

    network = Pair(use)
    network.table = nn.Parameter(torch.zeros(3))
    assert unfit_layers(network, X, ["a", "b"]) == {}
    assert [table is network.table for table in held] == [True]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_a_transformer_of_torch_runs_with_factorised_layers(nested):
    """Its fused kernel, which eval mode without gradients takes, reads the dense layers' weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if nested else nn.Sequential(layer)
    model.eval()
    x = torch.linspace(-1, 1, 40).reshape(1, 5, 8)
    cost = profile_model(model, input_shape=(5, 8))
    names = [layer.name for layer in cost.layers if layer.keeps_dense is None]
    assert {name.rpartition(".")[2] for name in names} == {"linear1", "linear2"}
    specs = {
        name: SeKronSpec(((shape[0], 1), (1, shape[1])), (8,))
        for name in names
        if (shape := tuple(model.get_submodule(name).weight.shape))
    }
    small = replace_layers(model, {name: factorise(model.get_submodule(name), spec) for name, spec in specs.items()})
    masked = {"src_key_padding_mask": torch.tensor([[False] * 4 + [True]])} if nested else {}
    with torch.no_grad():
        wanted, found = model(x, **masked), small(x, **masked)
    torch.testing.assert_close(found[:, :4], wanted[:, :4], rtol=1e-4, atol=1e-5)
    assert all(
        layer.activation_relu_or_gelu for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer)
    )
