import pytest
import torch
from torch import nn

from kronsearch.training.blocks import Recorder, block_names, feature_distance


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


def test_outputs_are_recorded_until_they_are_taken():
    network = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()), Two(), nn.Linear(3, 2))
    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(network, ["0", "1", "2"])
    hidden = network[0](data)
    network[2](network[1](hidden))
    seen = recorder.take()
    assert seen.keys() == {"0", "1"}
    assert seen["0"] is hidden
    torch.testing.assert_close(seen["1"], hidden.relu())
    assert not recorder.take()
    network[0](data)
    assert recorder.take().keys() == {"0"}


def test_the_last_call_counts():
    layer = nn.Identity()
    recorder = Recorder(nn.Sequential(layer), ["0"])
    layer(torch.zeros(1))
    layer(torch.ones(1))
    assert recorder.take()["0"] == 1


def test_closed_it_records_no_more():
    layer = nn.Linear(2, 2)
    recorder = Recorder(nn.Sequential(layer), ["0"])
    layer(torch.zeros(2))
    recorder.close()
    layer(torch.zeros(2))
    assert not recorder.take()
    assert not layer._forward_hooks


def test_a_module_that_is_not_there_is_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(AttributeError, match="nowhere"):
        Recorder(nn.Sequential(layer), ["0", "nowhere"])
    assert not layer._forward_hooks


def test_the_distance_is_relative_and_a_mean_over_blocks():
    teacher = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(3), "d": torch.ones(2)}
    student = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(1, 3)}
    assert feature_distance(student, teacher).item() == pytest.approx((4 / 25 + 0) / 2)
    assert feature_distance({}, teacher).item() == 0


def test_bf16_is_summed_in_float32():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    assert feature_distance({"a": 2 * ones}, {"a": ones}).item() == 1


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
