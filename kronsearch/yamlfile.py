"""YAML files from users: safe, of a bounded size and depth, and what is wrong with one in a line."""

from pathlib import Path
from typing import Any

import yaml

from kronsearch.errors import KronsearchError
from kronsearch.files import read_text

__all__ = ["read_yaml"]

_DEEPEST = 20


def read_yaml(path: Path, *, largest: int, error: type[KronsearchError]) -> tuple[Any, yaml.Node | None]:
    """Return the content of a YAML file, and its syntax tree (None of an empty one), where keys have line numbers.

    Args:
        path: of the file.
        largest: bytes that are read at the most.
        error: what is raised, with one line, if the file can't be read, is not YAML, uses aliases (which can stand for
            exponentially much) or is nested deeper than 20 levels (which takes PyYAML quadratic time).
    """
    try:
        text = read_text(path, largest)
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "not UTF-8 text"
        raise error(f"can't read {path} ({reason}): correct or remove it") from cause
    if text is None:
        raise error(f"{path} is larger than {largest >> 10} KiB: it holds a line or so per option")
    try:
        _refuse_what_explodes(text, path, error)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except KronsearchError:
        raise
    except Exception as cause:  # what makes values of tags raises anything
        mark = getattr(cause, "problem_mark", None)
        reason = getattr(cause, "problem", None) or getattr(cause, "reason", None) or type(cause).__name__
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise error(f"{where}: not YAML that can be read ({reason}): write lines such as `key: value`") from cause


def _refuse_what_explodes(text: str, path: Path, error: type[KronsearchError]) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise error(f"{path} uses aliases (*name), which are not read: write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise error(f"{path} is nested deeper than {_DEEPEST} levels: options are flatter than that")
