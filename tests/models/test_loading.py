"""Model specifications: each source, its weights, and its errors."""

import sys

import pytest
import torch
from torch import nn

from kronsearch.errors import CheckpointError, ModelError
from kronsearch.models import loading
from kronsearch.models.checkpoint import fingerprint_weights, save_safetensors
from kronsearch.models.loading import default_input_shape, load_model


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's project in the working directory."""
    (tmp_path / "users_model.py").write_text(
        "import torch\n"
        "def net(width=4):\n"
        "    import users_layers\n"
        "    model = users_layers.Net(3, width)\n"
        "    model.default_input_shape = (3,)\n"
        "    return model\n"
        "def fails():\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
        "number = 3\n"
        "def text():\n"
        "    return 'model'\n"
    )
    (tmp_path / "users_layers.py").write_text("from torch.nn import Linear as Net\n")
    (tmp_path / "broken_model.py").write_text("import no_such_module_here\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in ("users_model", "users_layers", "broken_model"):
        sys.modules.pop(name, None)


def test_zoo():
    model = load_model("zoo:cifar_resnet20", args={"num_classes": 7})
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_random_weights_are_always_the_same_and_the_global_generator_is_untouched():
    state = torch.get_rng_state()
    first = fingerprint_weights(load_model("zoo:cifar_resnet20"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3, generator=torch.default_generator)
    assert fingerprint_weights(load_model("zoo:cifar_resnet20")) == first


def test_digits_has_weights_of_its_own():
    built_in = fingerprint_weights(load_model("zoo:digits"))
    assert built_in == fingerprint_weights(load_model("zoo:digits", weights="DEFAULT"))
    assert built_in != fingerprint_weights(loading.digits())


def test_weights_from_a_file(tmp_path):
    source = loading.cifar_resnet20()
    save_safetensors(source, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")):
        assert fingerprint_weights(load_model("zoo:cifar_resnet20", weights=path)) == fingerprint_weights(source)
    with pytest.raises(CheckpointError, match=f"does not fit CifarResNet: {6 * 2 * (1 + 4)} missing"):
        load_model("zoo:cifar_resnet32", weights=tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint at none\.pth: no such file"):
        load_model("zoo:cifar_resnet32", weights="none.pth")


def test_a_compressed_network_is_no_weights_of_a_dense_one(tmp_path):
    save_safetensors(loading.digits(), tmp_path / "w.safetensors", {"format": "kronsearch"})
    with pytest.raises(CheckpointError, match="holds a compressed network, not weights of zoo:digits: load_compressed"):
        load_model("zoo:digits", weights=tmp_path / "w.safetensors")


def test_a_users_callable(project):
    model = load_model("users_model:net", args={"width": 6})
    assert isinstance(model, nn.Linear)
    assert not model.training
    assert model.out_features == 6
    assert default_input_shape("users_model:net", model) == (3,)
    assert default_input_shape("users_model:net", nn.Linear(3, 2)) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users_model:nothing", "users_model has no callable 'nothing', which the model users_model:nothing asks for"),
        ("users_model:number", "users_model has no callable 'number'"),
        ("users_model:text", "users_model:text gave a str, not a torch.nn.Module"),
        ("users_model:fails", "can't make users_model:fails: RuntimeError: first line$"),
        (
            "broken_model:net",
            "can't import broken_model .*: ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
        ("no_such_model:net", "can't import no_such_model .*: ModuleNotFoundError"),
        ("..:net", "can't import .*: TypeError"),
    ],
)
def test_errors_of_users_callables_are_one_line(project, spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


@pytest.mark.parametrize("spec", ["resnet18", "zoo:", ":digits", ""])
def test_malformed_specifications(spec):
    with pytest.raises(
        ModelError, match=r"unknown model .*: possible are zoo:NAME, torchvision:NAME, timm:NAME, MODULE"
    ):
        load_model(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo:cifar_resnet21", "unknown model 'zoo:cifar_resnet21': close to it are cifar_resnet"),
        ("zoo:qqq", "unknown model 'zoo:qqq': none is close"),
        ("torchvision:resnet81", "close to it are .*resnet18"),
        ("torchvision:fcn_resnet50", r"classifiers: pass torchvision\.models\.segmentation:fcn_resnet50, and --input"),
        ("timm:resnet18x", "close to it are resnet18"),
        ("timm:resnet18.no_such_tag", "unknown model 'timm:resnet18.no_such_tag': close to it are .*resnet18"),
        ("timm:hf_hub:someone/something", "unknown model"),
    ],
)
def test_unknown_names_get_suggestions(spec, message):
    if not spec.startswith("zoo"):
        pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(ModelError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("torchvision:googlenet", (3, 224, 224)),
        ("torchvision:mobilenet_v3_small", (3, 224, 224)),
        ("timm:resnet10t", (3, 176, 176)),
        ("zoo:digits", (1, 8, 8)),
        ("zoo:cifar_resnet20", (3, 32, 32)),
    ],
)
def test_models_and_their_input_shapes(spec, shape):
    if not spec.startswith("zoo"):
        pytest.importorskip(spec.partition(":")[0])
    model = load_model(spec)
    assert not model.training
    assert default_input_shape(spec, model) == shape


def test_the_image_size_asked_for_is_the_input_shape():
    pytest.importorskip("torchvision")
    model = load_model("torchvision:vit_b_16", args={"image_size": 64})
    assert default_input_shape("torchvision:vit_b_16", model) == (3, 64, 64)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        (
            "zoo:cifar_resnet20",
            "DEFAULT",
            "no weights 'DEFAULT' for zoo:cifar_resnet20: there is no such file, and only",
        ),
        ("torchvision:resnet18", "NONE", "its downloads are IMAGENET1K_V1, DEFAULT"),
        ("timm:resnet18", "no_tag", "its downloads are DEFAULT, a1_in1k"),
        ("timm:test_vit", "DEFAULT_", "its downloads are DEFAULT, "),
    ],
)
def test_unknown_weights(spec, weights, message):
    if not spec.startswith("zoo"):
        pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(ModelError, match=message):
        load_model(spec, weights=weights)


def test_wrong_arguments_and_failed_downloads(monkeypatch):
    with pytest.raises(ModelError, match=r"can't make zoo:digits: TypeError: .*unexpected keyword argument 'classes'"):
        load_model("zoo:digits", args={"classes": 3})
    models = pytest.importorskip("torchvision.models")

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        ModelError, match=r"can't download the weights DEFAULT of torchvision:resnet18 \(OSError: no rou"
    ):
        load_model("torchvision:resnet18", weights="DEFAULT")


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_missing_optional_packages(monkeypatch, source):
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(ModelError, match=rf"{source}:resnet18 needs {source}: pip install 'kronsearch\[vision\]'"):
        load_model(f"{source}:resnet18")
