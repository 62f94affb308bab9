import pytest
import torch

import kronsearch as ks
from kronsearch.errors import TrainingError
from kronsearch.training.modes import own_modes


def modes():
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def test_within_the_callers_modes_it_computes_as_outside():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert modes() == (False, True)
        with own_modes():
            assert modes() == (True, False)
        assert own_modes()(modes)() == (True, False)
        assert modes() == (False, True)


def test_inference_mode_is_refused_in_one_line():
    with torch.inference_mode(), pytest.raises(TrainingError, match=r"within torch.inference_mode\(\)") as caught:
        own_modes()(modes)()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [ks.apply_plan, ks.finetune, ks.search, ks.search_front, ks.sweep])
def test_so_does_whatever_compresses(entry):
    with torch.inference_mode(), pytest.raises(TrainingError, match="call it outside"):
        entry()
