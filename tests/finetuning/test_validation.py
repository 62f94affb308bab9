import copy
import math

import pytest
import torch

import kronsearch as ks
from kronsearch.finetuning.validation import Validation


@pytest.fixture(scope="module")
def mediocre(digits_model):
    """A network that is right about as often as not."""
    model, generator = copy.deepcopy(digits_model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.7 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_standard_error_is_about_that_of_so_many_images(digits_model, mediocre, fraction):
    data = ks.load_data("digits", val_fraction=fraction)
    found = Validation(digits_model, data, "cpu")(mediocre)
    assert found.n == data.size("val")
    assert 0.2 < found.metric < 0.9
    assert found.error == pytest.approx(math.sqrt(found.metric * (1 - found.metric) / found.n), rel=0.5)
    assert found.divergence > 0.1


def test_few_images_make_nearly_as_many_batches_as_many_do(digits_model):
    seen = []
    handle = digits_model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for fraction, batches in ((0.05, 9), (0.3, 40)):
        data = ks.load_data("digits", val_fraction=fraction)
        validation = Validation(digits_model, data, "cpu")
        seen.clear()
        assert validation(digits_model).divergence == pytest.approx(0.0, abs=1e-5)
        assert sum(seen) == data.size("val")
        assert len(seen) >= batches
        assert min(seen[:-1]) >= 8
    handle.remove()
