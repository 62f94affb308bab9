"""Compressed networks leave for elsewhere: torch.compile, torch.export and ONNX give the outputs that they give."""

import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from kronsearch.models.factorised import empty_layer, replace_layers
from kronsearch.models.loading import load_model
from kronsearch.sekron import SeKronSpec

ROUNDING = {"compiled": 1e-5, "onnx": 1e-4}  # relative to outputs of order one; float32 in another order


class Odd(nn.Module):
    """What the digits network has not: one axis, groups, uneven padding, a linear layer of rows in sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 4, padding="same", groups=2)
        self.grid = nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular")
        self.rows = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.line(x)).unflatten(2, (4, 5))
        x = torch.relu(self.grid(x)).flatten(2).transpose(1, 2)
        return self.rows(x).mean(1)


def compressed(model: nn.Module, specs: dict[str, SeKronSpec]) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    small = replace_layers(model, {name: empty_layer(model.get_submodule(name), spec) for name, spec in specs.items()})
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return small.eval()


def digits() -> tuple[nn.Module, Tensor]:
    specs = {
        "block1.conv1": SeKronSpec(((32, 1, 1, 1), (1, 1, 3, 3), (1, 32, 1, 1)), (8, 1)),
        "block1.conv2": SeKronSpec(((32, 1, 3, 1), (1, 32, 1, 3)), (8,)),
        "block2.conv1": SeKronSpec(((64, 1, 1, 1), (1, 1, 3, 3), (1, 32, 1, 1)), (8, 6), "chain"),
        "block2.conv2": SeKronSpec(((4, 4, 1, 1), (16, 16, 3, 3)), (3,), run=((0,), (1,))),
        "linear": SeKronSpec(((5, 8), (2, 8)), (2,)),
    }
    return compressed(load_model("zoo:digits"), specs), torch.rand(
        3, 1, 8, 8, generator=torch.Generator().manual_seed(1)
    )


def odd() -> tuple[nn.Module, Tensor]:
    specs = {
        "line": SeKronSpec(((6, 1, 1), (1, 1, 4), (1, 2, 1)), (3, 2), run=((1, 2), (0,))),
        "grid": SeKronSpec(((4, 2, 1, 1), (2, 3, 3, 3)), (2,), run=((0, 1),)),
        "rows": SeKronSpec(((2, 4), (3, 2)), (3,), run=((0, 1),)),
    }
    torch.manual_seed(0)
    return compressed(Odd(), specs), torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(1))


NETWORKS = pytest.mark.parametrize("network", [digits, odd])


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def check(found: Tensor, expected: Tensor, way: str) -> None:
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=ROUNDING[way], atol=ROUNDING[way])


@pytest.fixture(autouse=True)
def quiet():
    """What compilers and exporters say of their own insides is not for here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@NETWORKS
def test_torch_compile_and_new_weights_in_the_compiled_network(network):
    model, inputs = network()
    expected = outputs(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(outputs(compiled, inputs), expected, "compiled")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = outputs(model, inputs)
    assert not torch.allclose(changed, expected)
    check(outputs(compiled, inputs), changed, "compiled")
    (gradient,) = torch.autograd.grad(compiled(inputs).sum(), [next(model.parameters())])
    (expected,) = torch.autograd.grad(model(inputs).sum(), [next(model.parameters())])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@NETWORKS
def test_torch_export_with_its_file_and_any_batch(network):
    model, inputs = network()
    expected = outputs(model, inputs)  # which keeps weights; the program must hold the factors nevertheless
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    check(outputs(loaded.module(), inputs), expected, "compiled")
    check(outputs(loaded.module(), inputs[:2]), expected[:2], "compiled")
    assert set(loaded.state_dict) == set(model.state_dict())


@NETWORKS
def test_onnx(network, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs kronsearch[onnx]")
    pytest.importorskip("onnxscript", reason="needs kronsearch[onnx]")
    model, inputs = network()
    expected = outputs(model, inputs)
    path = tmp_path / "small.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, (inputs,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for images, wanted in ((inputs, expected), (inputs[:2], expected[:2])):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        check(torch.from_numpy(found), wanted, "onnx")
