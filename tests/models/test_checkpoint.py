"""Checkpoints: what is read, what is refused in one line, and files that are the same for the same weights."""

import argparse
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kronsearch.errors import CheckpointError, FileError
from kronsearch.models.checkpoint import (
    fingerprint_weights,
    load_state_dict,
    load_weights,
    read_metadata,
    save_safetensors,
)


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "hyper_parameters": {}},
        lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in state.items()},
        lambda state: {"net": state, "acc": torch.tensor(0.9), "epoch": 3, "optimizer": {"state": {}}},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin"])
def test_torch_checkpoints_are_unwrapped(tmp_path, wrap, suffix):
    state = dict(network().state_dict())
    torch.save(wrap(state), tmp_path / f"w{suffix}")
    other = network(1)
    load_weights(other, tmp_path / f"w{suffix}")
    assert same(other.state_dict(), state)


def test_the_old_format_of_torch_is_read(tmp_path):
    state = dict(network().state_dict())
    torch.save(state, tmp_path / "w.th", _use_new_zipfile_serialization=False)
    assert same(load_state_dict(tmp_path / "w.th"), state)


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    content = {"a": torch.zeros(1)}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors by name \(state_dict\)"):
        load_state_dict(tmp_path / "w.pt")


def test_a_network_that_is_a_wrapper_itself_has_its_prefix(tmp_path):
    model, other = nn.DataParallel(network(1)), network(2)
    torch.save(nn.DataParallel(other).state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model.module.state_dict(), other.state_dict())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_that_are_not_finite_are_refused(tmp_path, value):
    model, state = network(1), network(2).state_dict()
    state["2.weight"][0, 1] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"does not fit Sequential: 1 not finite \(2.weight\)"):
        load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), network(1).state_dict())


def test_numbers_too_large_for_a_parameter_are_refused(tmp_path):
    torch.save(network().double().state_dict(), tmp_path / "fits.pt")
    load_weights(network(), tmp_path / "fits.pt")
    torch.save({n: v.double() * 1e300 for n, v in network().state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"Sequential: 5 not finite \(0.weight, "):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_codes_of_a_quantised_network_are_no_weights(tmp_path, dtype, suffix):
    state = network().state_dict()
    state["2.weight"] = state["2.weight"].abs().to(dtype)
    (torch.save if suffix == ".pt" else save_file)(state, tmp_path / f"w{suffix}")
    with pytest.raises(CheckpointError, match=rf"kind \(2.weight {dtype}, expected torch.float32\)$"):
        load_weights(network(), tmp_path / f"w{suffix}")


def test_a_tensor_that_claims_more_than_any_memory_is_refused_unread(tmp_path):
    torch.save({**network().state_dict(), "2.weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"2.weight \(1048576, 1048576\), expected \(2, 4\)\)$"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_packed_archive_is_refused_unread(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(2**18)}, tmp_path / "w.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "w.pt") as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(CheckpointError, match=r"packed.pt is an archive of 10\d+ bytes in \d{4}, and torch.save packs"):
        load_state_dict(packed)


@pytest.mark.parametrize("names", [("module.0.weight", "b"), ("module.a", "module.b")])
def test_what_does_not_fit_without_its_prefix_is_told_as_it_is(tmp_path, names):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=rf"2 unexpected \({', '.join(names)}\)"):
        load_weights(network(), tmp_path / "w.pt")


def test_what_is_in_the_way_is_told(tmp_path):
    torch.save({"model": dict(network().state_dict()), "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"it holds an object \(argparse.Namespace\), and to make one could run"):
        load_state_dict(tmp_path / "w.pt")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def write_evil(path):
    path.write_bytes(pickle.dumps({"w": Evil()}))


def write_evil_zip(path):
    torch.save({"w": Evil()}, path)


def write_truncated(path):
    torch.save(dict(network().state_dict()), path)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize(
    "write",
    [
        write_evil,
        write_evil_zip,
        write_truncated,
        lambda path: torch.save(network(), path),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_truncated_and_hostile_files_are_refused_in_one_line(tmp_path, write, suffix):
    path = tmp_path / f"w{suffix}"
    write(path)
    with pytest.raises(
        CheckpointError, match=rf"w\{suffix} can't be read as a .* it (is truncated, of another|holds an object)"
    ) as caught:
        load_state_dict(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(network(), path)
    for size in (3, 100, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="can't be read as a safetensors file"):
            load_state_dict(path)
        with pytest.raises(CheckpointError, match="can't be read as a safetensors file"):
            read_metadata(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list in place of tensors by name"),
        ({}, "holds dict in place of tensors by name"),
        (torch.zeros(3), "holds Tensor in place of tensors by name"),
        ({"a": torch.zeros(1), "epoch": 3, 5: torch.zeros(1)}, r"by name \(epoch, a key of type int\)"),
        ({"a": torch.zeros(1, device="meta")}, r"holds more than tensors by name \(a\)"),
        (
            {"teacher": {"a": torch.zeros(1)}, "student": {"a": torch.zeros(1)}},
            r"holds more than tensors by name \(teacher, student\)",
        ),
        ({"a": torch.zeros(1), "b": {"c": torch.zeros(1)}}, r"holds more than tensors by name \(b\)"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "w.pt")


def test_a_key_that_is_long_to_tell_is_not_told(tmp_path):
    key = ()
    for _ in range(16):  # as text a quarter of a million characters
        key = (key, key)
    torch.save({key: torch.zeros(1), "n" * 1000: 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"by name \(a key of type tuple, n{200}…\)"):
        load_state_dict(tmp_path / "w.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt: no such file"):
        load_state_dict(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: it is a folder"):
        load_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: no such file"):
        read_metadata(tmp_path / "none.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_weights(tmp_path, suffix):
    path, source, target = tmp_path / f"w{suffix}", network(1), network(2)
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_safetensors(source, path)
    load_weights(target, path)
    assert same(target.state_dict(), source.state_dict())


def test_old_checkpoints_without_batch_counters_load(tmp_path):
    source, target = network(1), network(2)
    state = {n: v for n, v in source.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(target.state_dict(), source.state_dict())


def test_load_weights_names_what_does_not_fit_and_changes_nothing(tmp_path):
    model = network(1)
    before = fingerprint_weights(model)
    state = dict(network(2).state_dict())
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    state["2.bias"] = torch.zeros(2, dtype=torch.complex64)
    del state["1.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, tmp_path / "w.pt")
    expected = (
        r"w.pt does not fit Sequential: 1 missing \(1.bias\); 5 unexpected \(extra.0, extra.1, extra.2, …\); "
        r"2 of another shape or kind \(0.weight \(4, 3, 5, 5\), expected \(4, 3, 3, 3\), "
        r"2.bias torch.complex64, expected torch.float32\)$"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_weights(model, tmp_path / "w.pt")
    assert fingerprint_weights(model) == before


TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def awkward_state():
    base = torch.arange(24.0)
    state = {str(t).removeprefix("torch."): torch.arange(5).to(t) for t in TYPES}
    return state | {
        "shared": base,
        "shared too": base,
        "view": base[3:9],
        "transposed": base.view(4, 6).T,
        "channels_last": torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "ünïcode": torch.ones(1),
        "gradient": torch.ones(2, requires_grad=True),
    }


def test_safetensors_round_trip_of_awkward_tensors(tmp_path):
    state = awkward_state()
    save_safetensors(state, tmp_path / "a.safetensors", {"plan": 'a\n"b" ü', "schema": "1"})
    assert same(load_state_dict(tmp_path / "a.safetensors"), state)
    assert same(load_file(tmp_path / "a.safetensors"), state)
    assert read_metadata(tmp_path / "a.safetensors") == {"plan": 'a\n"b" ü', "schema": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_our_files_are_laid_out_as_those_of_safetensors(tmp_path):
    state = {name: value.clone() for name, value in network().state_dict().items()}
    save_safetensors(state, tmp_path / "ours.safetensors", {"one": "entry"})
    save_file(state, tmp_path / "theirs.safetensors", {"one": "entry"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_bytes_depend_on_the_contents_only(tmp_path):
    state = awkward_state()
    metadata = {str(i): "x" for i in range(20)}
    save_safetensors(state, tmp_path / "a.safetensors", metadata)
    save_safetensors(dict(reversed(state.items())), tmp_path / "b.safetensors", dict(reversed(metadata.items())))
    save_safetensors(load_state_dict(tmp_path / "a.safetensors"), tmp_path / "c.safetensors", metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_no_metadata(tmp_path):
    save_safetensors(network(), tmp_path / "w.safetensors")
    assert read_metadata(tmp_path / "w.safetensors") == {}
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert not file.metadata()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2).to_sparse(), "torch.float32"),
        (torch.zeros(2, device="meta"), "torch.float32"),
        ("text", "str"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, value, kind):
    with pytest.raises(
        CheckpointError, match=rf"can't write w \({kind}\) to .*a.safetensors: .* dense tensors of real"
    ):
        save_safetensors({"w": value}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.mkdir()
    with pytest.raises(FileError, match=r"can't write .*a.safetensors \(Is a directory\)"):
        save_safetensors(network(), path)
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint():
    model = network()
    first = fingerprint_weights(model)
    assert len(first) == 64
    assert fingerprint_weights(network()) == first
    assert fingerprint_weights(network().to(memory_format=torch.channels_last)) == first
    assert fingerprint_weights(network().double()) != first
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint_weights(model) != first
    assert fingerprint_weights(nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})) != fingerprint_weights(
        nn.ModuleDict({"b": nn.Linear(2, 2, bias=False)})
    )


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "import torch; from torch import nn; from kronsearch.models.checkpoint import fingerprint_weights;"
        "m = nn.Linear(3, 2); nn.init.ones_(m.weight); nn.init.zeros_(m.bias); print(fingerprint_weights(m))"
    )
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert other == fingerprint_weights(model)
