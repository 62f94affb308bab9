"""What of an earlier run is taken for the network that is handed over."""

import pytest
import torch

from kronsearch.models.apply import save_compressed
from kronsearch.models.checkpoint import read_metadata, save_safetensors
from kronsearch.search.finish import is_done


@pytest.fixture
def written(tmp_path, plan):
    path = tmp_path / "compressed.safetensors"
    save_compressed(torch.nn.Linear(2, 2), plan, path, epochs=1.0)
    return path


def test_the_network_of_the_plan_is_done(written, plan):
    assert is_done(written, plan, 1.0)
    assert not is_done(written, plan, 2.0)
    assert not is_done(written, plan.model_copy(update={"predicted_error": 0.5}), 1.0)
    assert not is_done(written.with_name("none.safetensors"), plan, 1.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: path.write_text("foreign"),
        lambda path: save_safetensors({}, path),
        lambda path: save_safetensors({}, path, read_metadata(path) | {"plan": "{}"}),
    ],
)
def test_a_damaged_or_foreign_file_is_not_done(written, plan, damage):
    damage(written)
    assert not is_done(written, plan, 1.0)
