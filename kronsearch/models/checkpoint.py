"""Weights on disk: reading foreign checkpoints without trusting them, writing safetensors, and fingerprints."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kronsearch.errors import CheckpointError
from kronsearch.files import replacing

__all__ = [
    "check_storable",
    "fill",
    "fingerprint_tensors",
    "fingerprint_weights",
    "load_state_dict",
    "load_weights",
    "read_metadata",
    "save_safetensors",
]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_LAYERS = 4  # of such wrappers around one another
_COUNTER = "n_averaged"  # of torch's AveragedModel
_FOREIGN = re.compile(r"GLOBAL (\S{1,200}) was not an allowed global")  # what torch says of what it doesn't unpickle
_LONGEST = 200  # characters of a name, or of what is wrong with a tensor, that are told
_SAVED = "a torch.save file of tensors"
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint onto the CPU, by name.

    A `.safetensors` file is read as such, any other as a torch.save file, of which nothing but tensors and plain
    containers is unpickled; {"state_dict": …} and the like are unwrapped, and so is the one dict of tensors that stands
    among other things.
    CheckpointError if the file is missing, truncated, of another kind, would take more memory than it is long, or holds
    anything but plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: {'it is a folder' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        with _unreadable(path, "a safetensors file"):
            return load_file(path)
    _refuse_bombs(path)
    with _unreadable(path, _SAVED):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _unwrap(content, path)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into `model`; names and shapes must be the model's.

    What wrappers such as DataParallel or torch.compile leave in front of all names is taken off. CheckpointError
    otherwise, as of `fill`; the model is then unchanged.
    """
    state = _without_prefix(load_state_dict(path), model.state_dict().keys())
    fill(model, state, f"{path} does not fit {type(model).__name__}")


def fill(model: nn.Module, state: Mapping[str, Tensor], refusal: str) -> None:
    """Copy tensors into a model; names and shapes must be the model's, and numbers of the same kind.

    Only batch norm's `num_batches_tracked`, which old checkpoints lack, may be missing. CheckpointError otherwise, with
    the first few tensors that are missing, unexpected, of another shape or kind, or parameters that are not finite as
    the model would hold them, behind the words of `refusal`; the model is then unchanged.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    counters = {n: v for n, v in own.items() if n not in state and n.rpartition(".")[2] == "num_batches_tracked"}
    state = {**state, **counters}
    differing = {name: told for name in own if name in state and (told := _difference(name, state[name], own[name]))}
    # only of what fits: another shape may stand for any number of entries, all of them at one place
    fitting = [name for name, _ in model.named_parameters() if name in state and name not in differing]
    problems = [
        _list("missing", [name for name in own if name not in state]),
        _list("unexpected", [name for name in state if name not in own]),
        _list("of another shape or kind", [*differing.values()]),
        _list("not finite", [name for name in fitting if not state[name].to(own[name].dtype).isfinite().all()]),
    ]
    if any(problems):
        raise CheckpointError(f"{refusal}: {'; '.join(filter(None, problems))}")
    model.load_state_dict(state, strict=False)  # what is not a tensor stays as it is


def save_safetensors(
    model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors of a model, or of a state dict, to a safetensors file, whole or not at all.

    The same tensors and metadata give the same bytes. A tensor with several names is written under each of them.
    CheckpointError if the file can't be written or a value can't be stored.
    """
    path = Path(path)
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    check_storable(state, path)
    # wide types first, so that each tensor starts at a multiple of its entries' size
    order = sorted(state, key=lambda name: (-state[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = state[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    # not by safetensors.torch.save_file: it refuses shared tensors and writes the metadata in random order
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write_whole(path, chain([len(text).to_bytes(8, "little"), text], (_bytes(state[name]) for name in order)))


def check_storable(state: Mapping[str, object], path: str | Path) -> None:
    """Raise CheckpointError if a value of a state dict can't be stored in a safetensors file, which is not written."""
    for name, value in state.items():
        if not _is_plain(value) or value.dtype not in _TYPE_NAMES:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"can't write {name} ({kind}) to {path}: a safetensors file holds dense tensors of real numbers"
            )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, {} if it has none; CheckpointError if it is not such a file."""
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}: no such file")
    with _unreadable(Path(path), "a safetensors file"), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def fingerprint_weights(model: nn.Module) -> str:
    """Return the fingerprint of the model's tensors."""
    return fingerprint_tensors(model.state_dict())


def fingerprint_tensors(state: Mapping[str, object]) -> str:
    """Return the SHA-256, in hex, of the tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)


@contextmanager
def _unreadable(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a hostile pickle can raise anything
        foreign = _FOREIGN.search(str(error))
        why = "is truncated, of another kind, or holds other objects"
        if foreign is not None:
            why = f"holds an object ({foreign[1]}), and to make one could run code"
        raise CheckpointError(
            f"{path} can't be read as {expected} ({type(error).__name__}): it {why}; save the model's state_dict() by "
            "torch.save or safetensors"
        ) from error


def _refuse_bombs(path: Path) -> None:
    """Refuse an archive whose entries are packed, or lie over one another: a small one may stand for gigabytes."""
    with _unreadable(path, _SAVED):
        held = sum(entry.file_size for entry in ZipFile(path).infolist()) if is_zipfile(path) else 0
    if held > path.stat().st_size:
        raise CheckpointError(
            f"{path} is an archive of {held} bytes in {path.stat().st_size}, and torch.save packs nothing: "
            "save the model's state_dict() by torch.save or safetensors"
        )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_LAYERS):  # a dict may hold itself
        content = _inner(content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__} in place of tensors by name")
    strange = [
        k if isinstance(k, str) else f"a key of type {type(k).__name__}"  # to print one may take any time and memory
        for k, v in content.items()
        if not (isinstance(k, str) and _is_plain(v))
    ]
    if strange:
        raise CheckpointError(
            f"{path} holds more than tensors by name ({_few(strange)}); a state dict, or one under "
            f"{', '.join(repr(key) for key in _WRAPPERS)}, is read"
        )
    return dict(content)


def _inner(content: Any) -> Any:
    """Return what a dict holds under a usual name, or its one dict of tensors, if it has no others but scalars."""
    if not isinstance(content, dict):
        return content
    if usual := [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]:
        return usual[0]
    held = [v for v in content.values() if isinstance(v, dict) and v and all(map(_is_plain, v.values()))]
    return held[0] if len(held) == 1 and not any(_is_plain(v) and v.dim() for v in content.values()) else content


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def _without_prefix(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a state without what all of its names begin with, up to a point, if then there are some of these names."""
    inner = {name: value for name, value in state.items() if name != _COUNTER or name in names}
    while inner and not inner.keys() <= set(names) and all("." in name for name in inner):
        if len({name.partition(".")[0] for name in inner}) > 1:
            break
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
    return inner if inner.keys() & set(names) else state


def _difference(name: str, got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape:
        return f"{name} {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not _is_alike(got, expected):
        return f"{name} {got.dtype}, expected {expected.dtype}"
    return ""


def _is_alike(got: Tensor, expected: Tensor) -> bool:
    """Tell whether one tensor's numbers can stand for the other's: codes of a quantised network can't."""
    if got.is_complex() or expected.is_complex():
        return got.is_complex() and expected.is_complex()
    return got.dtype in _TYPE_NAMES and (got.is_floating_point() or not expected.is_floating_point())


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({_few(names)})" if names else ""


def _few(names: list[str]) -> str:
    told = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in names[:3]]
    return ", ".join(told) + (", …" if len(names) > 3 else "")
