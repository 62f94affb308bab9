import pytest
import torch
from torch import nn

from kronsearch.training.blocks import block_names, feature_distance, recorded_outputs


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


def test_outputs_are_recorded_inside_only():
    network = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()), Two(), nn.Linear(3, 2))
    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with recorded_outputs(network, ["0", "1", "2"]) as seen:
        hidden = network[0](data)
        network[2](network[1](hidden))
    assert seen.keys() == {"0", "1"}
    assert seen["0"] is hidden
    torch.testing.assert_close(seen["1"], hidden.relu())
    network[0](data)
    assert seen["0"] is hidden


def test_the_last_call_counts():
    layer = nn.Identity()
    with recorded_outputs(nn.Sequential(layer), ["0"]) as seen:
        layer(torch.zeros(1))
        layer(torch.ones(1))
    assert seen["0"] == 1


def test_hooks_are_gone_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"shape|size"), recorded_outputs(nn.Sequential(layer), ["0"]) as seen:
        layer(torch.zeros(3))
    layer(torch.zeros(2))
    assert not seen


def test_a_module_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="nowhere"), recorded_outputs(nn.Identity(), ["nowhere"]):
        pass


def test_the_distance_is_relative_and_a_mean_over_blocks():
    teacher = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(3), "d": torch.ones(2)}
    student = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[2.0]]), "c": torch.ones(1, 3)}
    assert feature_distance(student, teacher).item() == pytest.approx((4 / 25 + 0) / 2)
    assert feature_distance({}, teacher).item() == 0


def test_bf16_is_summed_in_float32():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    assert feature_distance({"a": 2 * ones}, {"a": ones}).item() == 1
