"""The digits network: its weights do what they should, and training makes such weights."""

import torch

from kronsearch.models.checkpoint import fingerprint_weights, load_state_dict, read_metadata, save_safetensors
from kronsearch.models.loading import load_model
from kronsearch.models.zoo.digits import DIGITS_WEIGHTS
from kronsearch.models.zoo.train_digits import SETTINGS, train_digits
from kronsearch.training.evaluate import evaluate
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.sources import load_data


def test_the_built_in_weights_read_the_digits():
    data = load_data("digits", seed=0)
    model = load_model("zoo:digits")
    assert evaluate(model, data, "test").metric >= 0.985
    assert data.input_shape == model.default_input_shape


def test_the_file_is_small_and_as_we_write_it(tmp_path):
    assert DIGITS_WEIGHTS.stat().st_size < 500_000
    save_safetensors(load_state_dict(DIGITS_WEIGHTS), tmp_path / "again.safetensors", read_metadata(DIGITS_WEIGHTS))
    assert (tmp_path / "again.safetensors").read_bytes() == DIGITS_WEIGHTS.read_bytes()


def test_training_learns_and_is_deterministic():
    data = load_data("digits", seed=0)
    state = torch.get_rng_state()
    settings = TrainSettings(epochs=1, batch_size=SETTINGS.batch_size, lr=SETTINGS.lr)
    first, second = train_digits(data, settings, seed=3), train_digits(data, settings, seed=3)
    assert fingerprint_weights(first) == fingerprint_weights(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(first, data, "val").metric > 0.5  # guessing: 0.1
