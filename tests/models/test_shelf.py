import pytest
import torch

from kronsearch.errors import FileError
from kronsearch.models.checkpoint import load_state_dict, read_metadata, save_safetensors
from kronsearch.models.shelf import Shelf

KEY = {"weights": "abc", "layers": ["conv1", "conv2"], "seed": 0}


def tensors():
    return {"a/inputs": torch.arange(6.0).reshape(2, 3), "count": torch.tensor([7])}


def test_what_is_put_there_is_found_by_its_key(tmp_path):
    shelf = Shelf(tmp_path / "cache")
    assert shelf.get("moments", KEY) is None
    shelf.put("moments", KEY, tensors())
    found = Shelf(tmp_path / "cache").get("moments", dict(reversed(KEY.items())))
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("key", [{**KEY, "seed": 1}, {**KEY, "layers": ["conv1"]}, {"weights": "abc"}])
def test_another_key_or_kind_finds_nothing(tmp_path, key):
    shelf = Shelf(tmp_path)
    shelf.put("moments", KEY, tensors())
    assert shelf.get("moments", key) is None
    assert shelf.get("table", KEY) is None


def test_a_file_of_another_key_in_its_place_is_not_taken(tmp_path):
    shelf, other = Shelf(tmp_path), {**KEY, "seed": 1}
    shelf.put("moments", KEY, tensors())
    (mine,) = tmp_path.iterdir()
    shelf.put("moments", other, tensors())
    (theirs,) = set(tmp_path.iterdir()) - {mine}
    theirs.replace(mine)
    assert shelf.get("moments", KEY) is None


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_broken_file_is_as_none_and_written_over(tmp_path, content):
    shelf = Shelf(tmp_path)
    shelf.put("moments", KEY, tensors())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    assert shelf.get("moments", KEY) is None
    shelf.put("moments", KEY, tensors())
    assert shelf.get("moments", KEY) is not None


@pytest.mark.parametrize("change", [lambda t: t * torch.nan, lambda t: t[0], lambda t: t.bfloat16(), lambda t: t + 1])
def test_a_file_of_other_tensors_is_as_none(tmp_path, change):
    shelf = Shelf(tmp_path)
    shelf.put("moments", KEY, tensors())
    (file,) = tmp_path.iterdir()
    metadata, kept = read_metadata(file), load_state_dict(file)
    save_safetensors(kept, file, metadata)
    assert shelf.get("moments", KEY) is not None
    save_safetensors(kept | {"a/inputs": change(kept["a/inputs"])}, file, metadata)
    assert shelf.get("moments", KEY) is None


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shelf = Shelf(None)
    shelf.put("moments", KEY, tensors())
    assert shelf.get("moments", KEY) is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(FileError, match=rf"can't keep a cache in {folder} \({tmp_path / 'file'} is a file\): pass"):
            Shelf(folder)
    (tmp_path / "folder").mkdir()
    shelf = Shelf(tmp_path / "folder" / "cache")
    (tmp_path / "folder" / "cache").write_text("")
    with pytest.raises(FileError, match="can't write"):
        shelf.put("moments", KEY, tensors())
