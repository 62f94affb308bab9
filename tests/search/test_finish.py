"""What of an earlier run is taken for the network that is handed over."""

import pytest
import torch
from torch import nn

from kronsearch.models.apply import apply_plan, save_compressed
from kronsearch.models.checkpoint import read_metadata, save_safetensors
from kronsearch.search.finish import kept_network


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))


@pytest.fixture
def dense():
    return Dense()


@pytest.fixture
def small(dense, plan):
    return apply_plan(dense, plan)


@pytest.fixture
def written(tmp_path, small, plan):
    path = tmp_path / "compressed.safetensors"
    save_compressed(small, plan, path, epochs=1.0)
    return path


def test_the_network_of_the_plan_is_kept(written, dense, small, plan):
    kept = kept_network(dense, written, plan, 1.0)
    assert all(torch.equal(own, kept.state_dict()[name]) for name, own in small.state_dict().items())
    assert kept_network(dense, written, plan, 2.0) is None
    assert kept_network(dense, written, plan.model_copy(update={"predicted_error": 0.5}), 1.0) is None
    assert kept_network(dense, written.with_name("none.safetensors"), plan, 1.0) is None


def rewrite(path, small, change):
    save_safetensors(small.state_dict() | change(small.state_dict()), path, read_metadata(path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, small: path.write_bytes(path.read_bytes()[:500]),
        lambda path, small: path.write_text("foreign"),
        lambda path, small: save_safetensors({}, path),
        lambda path, small: save_safetensors({}, path, read_metadata(path)),
        lambda path, small: save_safetensors({}, path, read_metadata(path) | {"plan": "{}"}),
        lambda path, small: rewrite(path, small, lambda state: {"conv.bias": state["conv.bias"] * torch.nan}),
        lambda path, small: rewrite(path, small, lambda state: {"conv.bias": state["conv.bias"][:3]}),
    ],
)
def test_a_damaged_or_foreign_file_is_as_good_as_none(written, dense, small, plan, damage):
    damage(written, small)
    assert kept_network(dense, written, plan, 1.0) is None
