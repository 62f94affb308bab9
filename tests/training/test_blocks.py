import pytest
import torch
from torch import nn

from kronsearch.training.blocks import Watched, block_names, feature_distance


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ((), ()),
        (("conv1", "fc"), ()),
        (("layer1.0.conv2", "layer1.0.conv1", "conv1", "layer2.0.conv1"), ("layer1.0", "layer2.0")),
        (("features.0", "features.3", "classifier"), ("features",)),
    ],
)
def test_blocks_are_what_holds_the_layers(layers, blocks):
    assert block_names(layers) == blocks


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_outputs_of_modules_are_told_beside_those_of_the_network():
    network = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()), Two(), nn.Linear(3, 2))
    network[3].forward = lambda pair: pair[0]
    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    outputs, seen = Watched(network, ["1", "0", "2"])(data)
    assert list(seen) == ["1", "0"]
    torch.testing.assert_close(seen["0"], nn.functional.linear(data, network[0].weight, network[0].bias))
    torch.testing.assert_close(seen["1"], seen["0"].relu())
    assert outputs is seen["1"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()
        self.calls = 2

    def forward(self, x):
        for count in range(self.calls):
            self.layer(x + count)
        return x


def test_the_last_call_counts_and_none_of_a_run_before():
    network = Twice()
    watched = Watched(network, ["layer"])
    _, seen = watched(torch.zeros(()))
    assert seen["layer"] == 1
    network.calls = 0
    _, seen = watched(torch.zeros(()))
    assert not seen


def test_modules_may_be_those_of_a_model_inside():
    model = nn.Sequential(nn.Linear(2, 2))
    _, seen = Watched(nn.Sequential(model, nn.ReLU()), ["0"], model)(torch.zeros(1, 2))
    assert torch.equal(seen["0"], model(torch.zeros(1, 2)))


def test_closed_it_watches_no_more():
    layer = nn.Linear(2, 2)
    watched = Watched(nn.Sequential(layer), ["0"])
    assert layer._forward_hooks
    watched.close()
    assert not layer._forward_hooks


def test_a_module_that_is_not_there_is_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(AttributeError, match="nowhere"):
        Watched(nn.Sequential(layer), ["0", "nowhere"])
    assert not layer._forward_hooks


def test_the_distance_is_relative_and_a_mean_over_blocks():
    teacher = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(3), "d": torch.ones(2)}
    student = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(1, 3)}
    assert feature_distance(student, teacher).item() == pytest.approx((4 / 25 + 0) / 2)
    assert feature_distance({}, teacher).item() == 0


def test_bf16_is_summed_in_float32():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    assert feature_distance({"a": 2 * ones}, {"a": ones}).item() == 1


def test_a_block_that_puts_out_nothing_does_not_drown_the_others():
    teacher = {"a": torch.full((4, 3), 2.0), "b": torch.zeros(4, 3), "none": torch.zeros(0)}
    student = {"a": torch.full((4, 3), 3.0), "b": torch.full((4, 3), 1e-3), "none": torch.zeros(0)}
    student["b"].requires_grad_()
    distance = feature_distance(student, teacher)
    assert distance.item() == pytest.approx((1 / 4 + 1e-6 / (1e-6 * 2)) / 2)
    distance.backward()
    assert student["b"].grad.isfinite().all()
    assert feature_distance(dict.fromkeys("a", teacher["b"]), dict.fromkeys("a", teacher["b"])).item() == 0
    assert feature_distance({"none": student["none"]}, {"none": teacher["none"]}).item() == 0


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_relative_squared_distance(precision):
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(6, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student = found.to(precision).contiguous(memory_format=torch.channels_last).requires_grad_()
    teacher = wanted.to(precision).contiguous(memory_format=torch.channels_last)
    distance = feature_distance({"a": student, "b": teacher}, {"a": teacher, "b": teacher})
    distance.backward()

    found.requires_grad_()
    expected = (found - wanted).square().sum() / wanted.square().sum() / 2
    expected.backward()
    tolerance = 1e-6 if precision != torch.bfloat16 else 1e-2
    assert distance.dtype == torch.promote_types(precision, torch.float32)
    torch.testing.assert_close(distance.double(), expected, rtol=tolerance, atol=0)
    assert student.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(student.grad.double(), found.grad, rtol=tolerance, atol=tolerance * 1e-2)
