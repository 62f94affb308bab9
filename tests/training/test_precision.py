import pytest
import torch
from torch import nn

from kronsearch.errors import ModelError, TrainingError
from kronsearch.training.precision import (
    eval_mode,
    forward,
    forward_watched,
    precision_for,
    require_compiler,
)


class Spy(nn.Module):
    def __init__(self, result=lambda x: x):
        super().__init__()
        self.result = result

    def forward(self, x):
        self.seen = x
        return self.result(x)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_bf16_only_where_the_processor_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision_for("cpu") == expected


def test_float32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_for("cpu") == "float32"
    assert precision_for("meta") == "float32"


def test_images_arrive_in_channels_last_and_other_inputs_as_they_are():
    spy = Spy()
    images = torch.zeros(2, 3, 4, 5)
    forward(spy, images, "float32")
    assert spy.seen.is_contiguous(memory_format=torch.channels_last)
    tokens = torch.zeros(2, 3, 4)
    forward(spy, tokens, "float32")
    assert spy.seen is tokens


def test_bf16_computes_in_bf16_and_returns_float32():
    linear = Spy(lambda x: x @ torch.full((1, 1), 1 + 2**-12))
    x = torch.ones(1, 1)
    assert forward(linear, x, "float32").item() == 1 + 2**-12
    outputs = forward(linear, x, "bf16")
    assert outputs.item() == 1  # bf16 has 8 bits of mantissa
    assert outputs.dtype == torch.float32
    assert forward(Spy(), x.double(), "float32").dtype == torch.float64


def test_float32_is_float32_inside_a_callers_autocast():
    linear = Spy(lambda x: x @ torch.full((1, 1), 1 + 2**-12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(linear, torch.ones(1, 1), "float32").item() == 1 + 2**-12


def test_several_outputs_are_an_error():
    with pytest.raises(ModelError, match="Spy returned a tuple, one tensor is needed"):
        forward(Spy(lambda x: (x, x)), torch.zeros(1, 1), "float32")


def test_eval_mode_puts_every_module_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(1)))
    model[1][0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False]
    with pytest.raises(ModelError, match="one tensor is needed"), eval_mode(model):
        forward(Spy(lambda x: (x, x)), torch.zeros(1, 1), "float32")
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_a_network_of_another_precision_is_told_as_such():
    with pytest.raises(
        ModelError, match=r"it has float64 parameters, and float32 inputs; pass it as float32"
    ) as refusal:
        forward(nn.Linear(2, 2, dtype=torch.float64), torch.zeros(1, 2), "float32")
    assert "made for" not in str(refusal.value)


def test_of_a_watched_network_the_model_is_named():
    model, watched = Spy(lambda x: (x, x)), Spy(lambda x: ((x, x), {}))
    with pytest.raises(ModelError, match="Spy returned a tuple, one tensor is needed"):
        forward_watched(watched, torch.zeros(1, 1), "float32", model)
    linear = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="Linear can't run on inputs of shape"):
        forward_watched(nn.Sequential(linear), torch.zeros(1, 3), "float32", linear)
    outputs, blocks = forward_watched(Spy(lambda x: (x.bfloat16(), {"a": x})), torch.ones(1, 1), "float32", model)
    assert outputs.dtype == torch.float32
    assert blocks.keys() == {"a"}


def test_without_a_compiler_it_is_told_what_is_missing(monkeypatch):
    def fail(*_):
        raise OSError("no compiler\nanywhere")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(TrainingError, match=r"torch.compile does not work here \(.*no compiler\): install what"):
        require_compiler("cpu")


def test_what_a_backend_of_the_compiler_raised_is_told(monkeypatch):
    def fail(*_):
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: killed\n\nmore")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(TrainingError, match=r"\(backend='inductor' raised: CppCompileError: killed\): install"):
        require_compiler("cpu")
