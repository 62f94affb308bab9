"""What takes long to compute, kept on disk by what it was computed from."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from kronsearch.errors import CheckpointError, FileError
from kronsearch.models.checkpoint import fingerprint_tensors, load_state_dict, read_metadata, save_safetensors

__all__ = ["Shelf", "versions"]

_KEY, _DIGEST = "key", "digest"


class Shelf:
    """A folder of named tensors, each file whole or not there, found again by all that its content depends on.

    Args:
        folder: where they are; None keeps nothing.

    Raises:
        FileError: a file is in the folder's place.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and (taken := next((path for path in (folder, *folder.parents) if path.is_file()), None)):
            raise FileError(f"can't keep a cache in {folder} ({taken} is a file): pass another --cache")
        self.folder = folder

    def get(self, kind: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return what was put there under this key, None if nothing was, or if it can't be read or was changed."""
        path = self._path(kind, key)
        if path is None or not path.is_file():
            return None
        try:
            told = read_metadata(path)
            if told.get(_KEY) == _text(key):
                tensors = load_state_dict(path)
                return tensors if told.get(_DIGEST) == fingerprint_tensors(tensors) else None
        except CheckpointError:
            pass  # it is computed anew, and written over
        return None

    def put(self, kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under a key.

        Raises:
            CheckpointError, FileError: they can't be written.
        """
        path = self._path(kind, key)
        if path is not None:
            save_safetensors(tensors, path, {_KEY: _text(key), _DIGEST: fingerprint_tensors(tensors)})

    def _path(self, kind: str, key: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{kind}-{hashlib.sha256(_text(key).encode()).hexdigest()[:24]}.safetensors"


def versions() -> dict[str, str]:
    """Return the versions that all that is computed here depends on."""
    return {name: version(name) for name in ("kronsearch", "torch")}


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
