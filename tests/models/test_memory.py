import os

import pytest
import torch
from torch import nn

from kronsearch.models.memory import peak_memory
from kronsearch.sekron import SeKronLinear, SeKronSpec


class Steps(nn.Module):
    """Makes 3,000 floats, then 1,000 from them, then 2,000 from those: at most 4,000 at a time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(500))
        self.register_buffer("count", torch.zeros(10, dtype=torch.int64))

    def forward(self, x):
        wide = x.repeat(3)
        narrow = wide[:1000].clone()
        del wide
        return narrow.repeat(2)


@pytest.mark.parametrize("name", [None, "3"])
def test_it_is_what_is_alive_at_once_with_parameters_and_buffers(monkeypatch, name):
    if name is None:
        monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    else:
        monkeypatch.setenv("KINETO_LOG_LEVEL", name)
    with torch.inference_mode():
        assert peak_memory(Steps(), torch.ones(1000)) == 4 * (500 + 4000) + 8 * 10
    assert os.environ.get("KINETO_LOG_LEVEL") == name


def test_what_a_layer_keeps_of_its_first_run_counts_and_earlier_runs_do_not():
    """Of two merged factors the layer keeps the merged one, as large as the kernel."""
    linear, inputs = nn.Linear(32, 32, bias=False), torch.ones(1, 32)
    spec = SeKronSpec(((8, 4), (4, 8)), (2,), run=((0, 1),))
    layer = SeKronLinear.from_linear(linear, spec)
    several = nn.Sequential(*(SeKronLinear.from_linear(linear, spec) for _ in range(4))).eval()
    with torch.inference_mode():
        first = peak_memory(layer, inputs)
        layer(inputs)
        assert peak_memory(layer, inputs) == first
        assert first >= 4 * (spec.params + 32 * 32 + 32)
        assert peak_memory(linear, inputs) == 4 * (32 * 32 + 32)
        # what one layer keeps is still there when the next one runs
        assert peak_memory(several, inputs) >= 4 * 4 * (spec.params + 32 * 32)
