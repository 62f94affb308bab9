"""The options of the command line: checked, and filled up from a `kronsearch.yaml` in the working directory."""

import json
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from kronsearch.choices import DecoderName, ObjectiveName, SamplerName, SensitivityName
from kronsearch.errors import KronsearchError
from kronsearch.jsontext import read_json
from kronsearch.yamlfile import read_yaml

__all__ = ["CONFIG_FILE", "OptionError", "Settings", "read_settings", "resolve"]

CONFIG_FILE = Path("kronsearch.yaml")
_LARGEST_FILE = 64 * 2**10
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class OptionError(KronsearchError, ValueError):
    """An option is missing, or can't be read, on the command line or in kronsearch.yaml."""


def _seconds(value: object) -> object:
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None or float(found[1]) == 0:
        raise ValueError("write a duration such as 90s, 30m or 2h")
    return float(found[1]) * _SECONDS[found[2]]


def _shape(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("write the sizes of one example without the batch, such as 3,224,224")
    sizes = [str(part).strip() for part in parts]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", size, re.ASCII) for size in sizes):
        raise ValueError("write the sizes of one example without the batch, such as 3,224,224")
    return tuple(map(int, sizes))


def _json_object(value: object) -> object:
    wanted = """write a JSON object of the model's keyword arguments, such as '{"num_classes": 10}'"""
    try:
        value = read_json(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False, default=str).encode()  # halves of characters can't be written to a plan
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(wanted)
    return value


def _counts(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    counts = [str(part).strip() for part in parts]
    if not counts or not all(re.fullmatch(r"[1-9][0-9]{0,5}", count, re.ASCII) for count in counts):
        raise ValueError("write one count or several, such as 1,8")
    return tuple(map(int, counts))


def _threads(value: object) -> object:
    counts = _counts(value)
    if isinstance(counts, tuple):
        _no_more_than_cores(max(counts))
    return counts


def _no_more_than_cores(count: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count > cores:
        raise ValueError(f"there are {cores} cores to run on: more threads wait for each other")
    return count


class Settings(BaseModel):
    """All options of all commands, as `kronsearch.yaml` may hold them; each command takes those it has.

    `timeout` is in seconds here, `30m` and the like where it is written; `input_shape`, `model_args`, `batch` and
    `threads` are read too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    model_args: Annotated[dict[str, JsonValue], BeforeValidator(_json_object)] = {}
    weights: str | None = None
    data: str | None = None
    input_shape: Annotated[tuple[int, ...], BeforeValidator(_shape)] | None = None
    budget_flops: str | int | None = None
    budget_params: str | int | None = None
    budget_latency: str | None = None
    latency_batch: Annotated[int, Field(ge=1, le=10**5)] = 1
    latency_threads: Annotated[int, Field(ge=1), AfterValidator(_no_more_than_cores)] = 1
    allow_slower: bool = False
    space: str = "default"
    decoder: DecoderName = "allocate"
    sampler: SamplerName = "gp"
    objective: ObjectiveName = "score"
    sensitivity: SensitivityName = "measured"
    trials: Annotated[int, Field(ge=1, le=10**6)] = 20
    timeout: Annotated[float, BeforeValidator(_seconds)] | None = None
    storage: str | None = None
    study: str | None = None
    out: str = "kronsearch-out"
    cache: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    final_epochs: Annotated[float, Field(ge=0)] = 10.0
    batch: Annotated[tuple[int, ...], BeforeValidator(_counts)] = (1,)
    threads: Annotated[tuple[int, ...], BeforeValidator(_threads)] | None = None
    seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    epochs: Annotated[float, Field(gt=0)] = 10.0
    lr: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 128
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: bool = False
    split: Literal["test", "val"] = "test"
    quiet: bool = False
    debug: bool = False


def resolve(given: Mapping[str, object], *, config_file: Path = CONFIG_FILE) -> Settings:
    """Return the options given (None: not given) on top of those of the file, if there is one, and of the defaults.

    Raises:
        OptionError: the file or an option is malformed.
    """
    options = {name: value for name, value in given.items() if value is not None}
    try:
        on_the_line = Settings.model_validate(options)
    except ValidationError as error:
        name, reason = _first(error)
        raise OptionError(f"--{_dashed(name)} {options[name]}: {reason}") from error
    in_the_file = read_settings(config_file)
    chosen = {name: getattr(in_the_file, name) for name in in_the_file.model_fields_set}
    chosen |= {name: getattr(on_the_line, name) for name in on_the_line.model_fields_set}
    return Settings.model_construct(**chosen)  # each was validated above


def read_settings(path: Path) -> Settings:
    """Read a `kronsearch.yaml`; without one, all settings have their defaults.

    Raises:
        OptionError: it is not a mapping of options, or an option is unknown or malformed; the line is named.
    """
    if not path.exists():
        return Settings()
    content, node = read_yaml(path, largest=_LARGEST_FILE, error=OptionError)
    if node is None or content is None:
        return Settings()
    if not isinstance(content, dict):
        raise OptionError(f"{path} is not a mapping of options: write lines such as `trials: 20`")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in options:
            raise OptionError(f"{path}, line {lines.get(str(key), 1)}: {_dashed(name)} stands there twice: keep one")
        options[name] = value
    if len(content) < len(node.value):
        raise OptionError(f"{path} holds an option twice: keep one")
    try:
        return Settings.model_validate(options)
    except ValidationError as error:
        name, reason = _first(error)
        line = next((line for key, line in lines.items() if key.replace("-", "_") == name), 1)
        raise OptionError(f"{path}, line {line}: {_dashed(name)}: {reason}") from error


def _first(error: ValidationError) -> tuple[str, str]:
    """Return the option's name and what is wrong with it."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "an option's name"
    if first["type"] == "extra_forbidden":
        close = get_close_matches(name, Settings.model_fields, n=1)
        hint = f"did you mean {_dashed(close[0])}?" if close else "see `kronsearch run --help`"
        return name, f"there is no such option: {hint}"
    return name, first["msg"].removeprefix("Value error, ")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
