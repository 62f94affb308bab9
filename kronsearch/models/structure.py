"""What a network is besides its weights, as far as its modules tell."""

import hashlib
from collections.abc import Mapping

from torch import nn

__all__ = ["fingerprint_structure"]

_DEEPEST = 4  # containers within each other


def fingerprint_structure(model: nn.Module) -> str:
    """Return the SHA-256, in hex, of the names and classes of modules and of what they hold as public attributes.

    Of numbers, texts and containers of them the values count, of functions and classes the names, of all else the kind.
    So networks of the same weights differ if they were made with other arguments. Code isn't looked at.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        told = ", ".join(f"{key}={_told(held[key])}" for key in sorted(held))
        digest.update(f"{name} {_told(type(module))} {told}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _told(value: object, depth: int = 0) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return f"[{', '.join(_told(part, depth + 1) for part in value)}]"
    if depth < _DEEPEST and isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_told(part, depth + 1) for part in value))}}}"
    if depth < _DEEPEST and isinstance(value, Mapping):
        return f"{{{', '.join(f'{_told(k, depth + 1)}: {_told(v, depth + 1)}' for k, v in value.items())}}}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))
