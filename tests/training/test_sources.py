import sys

import numpy as np
import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.sources import load_data

RECORD = 1 + 3 * 32 * 32


def write_cifar(folder, per_file=20):
    """Fake binary files; pixel (c, y, x) of image i of file f is a hash of these, labels go round."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content = {}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(256, size=(per_file, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(per_file) % 10
        records.tofile(folder / name)
        content[name] = records
    return content


def test_digits_are_all_there_and_only_validation_depends_on_the_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert first.input_shape == (1, 8, 8)
    assert sum(first.size(split) for split in ("train", "val", "test")) == 1797
    assert first.size("test") == pytest.approx(1797 / 5, abs=5)
    assert first.size("val") == pytest.approx(0.1 * (1797 - first.size("test")), abs=5)
    tests = [torch.cat([images for images, _ in data.batches("test", 500)]) for data in (first, second)]
    vals = [torch.cat([images for images, _ in data.batches("val", 500)]) for data in (first, second)]
    assert torch.equal(*tests)
    assert not torch.equal(vals[0][:100], vals[1][:100])
    assert first.fingerprint == load_data("digits", seed=0).fingerprint != second.fingerprint


def test_digits_are_normalised():
    data = load_data("digits")
    images = torch.cat([images for images, _ in data.batches("train", 500)])
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar_binary_files(tmp_path, below):
    folder = tmp_path / "data"
    content = write_cifar(folder / below)
    data = load_data(f"cifar10:{folder}", val_fraction=0.2)
    assert (data.size("train"), data.size("val"), data.size("test")) == (80, 20, 20)
    assert data.input_shape == (3, 32, 32)
    assert data.spec == f"cifar10:{folder}"
    ((images, labels),) = data.batches("test", 100)
    assert labels.tolist() == content["test_batch.bin"][:, 0].tolist()
    pixel = content["test_batch.bin"][3, 1 + 32 * 32 * 1 + 32 * 5 + 7]  # red, green, blue planes, row by row
    assert images[3, 1, 5, 7].item() == pytest.approx((pixel / 255 - 0.456) / 0.224, abs=1e-5)
    splits = data._splits
    ours = torch.cat([splits["train"][0], splits["val"][0]]).flatten(1)
    theirs = np.concatenate([content[f"data_batch_{i}.bin"] for i in range(1, 6)])[:, 1:]
    assert sorted(map(bytes, ours.numpy())) == sorted(map(bytes, theirs))
    assert torch.bincount(splits["val"][1]).tolist() == [2] * 10


def test_cifar_fingerprint_does_not_depend_on_the_place(tmp_path):
    write_cifar(tmp_path / "a")
    write_cifar(tmp_path / "b")
    assert load_data(f"cifar10:{tmp_path / 'a'}").fingerprint == load_data(f"cifar10:{tmp_path / 'b'}").fingerprint


def damage_truncate(folder):
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_grow(folder):
    with (folder / "data_batch_2.bin").open("r+b") as file:
        file.truncate(10_001 * RECORD)


def damage_empty(folder):
    (folder / "data_batch_2.bin").write_bytes(b"")


def damage_label(folder):
    content = bytearray((folder / "data_batch_2.bin").read_bytes())
    content[RECORD] = 10
    (folder / "data_batch_2.bin").write_bytes(content)


def damage_remove(folder):
    (folder / "data_batch_2.bin").unlink()


def damage_folder(folder):
    (folder / "data_batch_2.bin").unlink()
    (folder / "data_batch_2.bin").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_truncate,
            rf"data_batch_2\.bin has {20 * RECORD - 1} bytes: a CIFAR-10 binary file has {RECORD} for each",
        ),
        (damage_grow, rf"data_batch_2\.bin has {10_001 * RECORD} bytes"),
        (damage_empty, r"data_batch_2\.bin has 0 bytes"),
        (damage_label, r"data_batch_2\.bin has a label of 10"),
        (damage_remove, r"can't read .*data_batch_2\.bin: No such file"),
        (damage_folder, r"data_batch_2\.bin has \d+ bytes"),
    ],
)
def test_damaged_cifar_files_are_one_line_errors(tmp_path, damage, message):
    write_cifar(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"cifar10:{tmp_path / 'data'}")
    assert "\n" not in str(caught.value)


def test_no_cifar_there(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*unpack cifar-10-binary\.tar\.gz"):
        load_data(f"cifar10:{tmp_path}")


def test_altered_pickles_are_not_unpickled(tmp_path):
    pytest.importorskip("torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(DataError, match="is incomplete or altered"):
        load_data(f"cifar10:{tmp_path}")


def test_python_files_need_torchvision(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'kronsearch\[vision\]'"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "Digits", "cifar10", "cifar10:", ":f", "imagefolder:"])
def test_unknown_data(spec):
    with pytest.raises(DataError, match=r"unknown data .*possible are digits, cifar10:DIR, imagefolder:DIR and MODULE"):
        load_data(spec)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_validation_fraction(fraction):
    with pytest.raises(DataError, match="must be between 0 and 1"):
        load_data("digits", val_fraction=fraction)


def test_a_smaller_validation_split_is_a_part_of_a_larger_one(tmp_path):
    write_cifar(tmp_path / "data")
    usual, few = (load_data(f"cifar10:{tmp_path / 'data'}", seed=3, val_fraction=part) for part in (None, 0.01))
    assert (usual.size("val"), few.size("val"), few.size("train")) == (10, 10, 90)  # one of each class, at the least
    many = load_data(f"cifar10:{tmp_path / 'data'}", seed=3, val_fraction=0.3)
    held = {bytes(image.numpy()) for image in many._splits["val"][0]}
    assert {bytes(image.numpy()) for image in usual._splits["val"][0]} < held
    assert usual.fingerprint != many.fingerprint


MODULE = """
from kronsearch.training.sources import load_data

number = 3

def good(seed):
    return load_data("digits", seed=seed + 1)

def foreign(seed):
    return [seed]

def failing(seed):
    return 1 / 0

def wordy(seed):
    raise RuntimeError("first line\\n  second line")

def without_seed():
    return None

def unfinished(seed):
    data = load_data("digits")
    del data.task
    return data
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_data_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "users_data_module"
    sys.modules.pop("users_data_module", None)
    assert sys.path == path


def test_data_of_the_user(user_module):
    data = load_data(f"{user_module}:good", seed=4)
    assert (data.spec, data.seed) == (f"{user_module}:good", 4)
    assert data.fingerprint == load_data("digits", seed=5).fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foreign", "returned a list, not a kronsearch Data"),
        ("failing", "its code failed with ZeroDivisionError"),
        ("wordy", "RuntimeError: first line second line$"),
        ("without_seed", "its code failed with TypeError"),
        ("unfinished", "TensorData does not set task"),
        ("number", "has no callable 'number'"),
        ("nothing", "has no callable 'nothing'"),
    ],
)
def test_unusable_data_of_the_user(user_module, name, message):
    with pytest.raises(DataError, match=message):
        load_data(f"{user_module}:{name}")


def test_no_such_module(user_module):
    with pytest.raises(DataError, match=r"no module named 'users_other_module' .*possible are digits"):
        load_data("users_other_module:f")
