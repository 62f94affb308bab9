"""Model specifications: `zoo:NAME`, `torchvision:NAME`, `timm:NAME` and `MODULE:CALLABLE`."""

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kronsearch.errors import CheckpointError, ModelError, first_line
from kronsearch.models.apply import is_compressed
from kronsearch.models.checkpoint import load_weights
from kronsearch.models.zoo.cifar_resnet import (
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
)
from kronsearch.models.zoo.digits import DIGITS_WEIGHTS, digits
from kronsearch.usercode import working_directory_importable

__all__ = ["default_input_shape", "load_model"]

_ZOO: Mapping[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": cifar_resnet20,
    "cifar_resnet32": cifar_resnet32,
    "cifar_resnet44": cifar_resnet44,
    "cifar_resnet56": cifar_resnet56,
    "cifar_resnet110": cifar_resnet110,
    "digits": digits,
}
_ZOO_WEIGHTS = {"digits": DIGITS_WEIGHTS}
_INIT_SEED = 0


def load_model(spec: str, *, weights: str | Path | None = None, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model that `spec` names, on the CPU and in eval mode.

    - `zoo:NAME`: a network of kronsearch.models.zoo.
    - `torchvision:NAME`: a classification model of torchvision.
    - `timm:NAME`: a model of timm, with or without the tag of its weights.
    - `MODULE:CALLABLE`: what CALLABLE(**args) of an importable module returns; the working directory is searched first.

    `weights` is a checkpoint file, or the name of weights that torchvision or timm download ("DEFAULT" is their best);
    "DEFAULT" and None are the trained weights of zoo:digits. For any other model None leaves random weights, always
    the same ones; the global random generators are left as they were. `args` are keyword arguments for the constructor.

    Raises ModelError if the model is unknown, can't be made or its weights can't be had, CheckpointError if the file
    does not fit.
    """
    source, name = _split(spec)
    kwargs = dict(args or {})
    file, download = _file_or_name(weights)
    if source == "zoo" and download in (None, "DEFAULT") and file is None:
        file = _ZOO_WEIGHTS.get(name)
        download = None if file else download
    build = _builder(spec, source, name, download)
    with _same_random_weights(), _construction(spec, download):
        model = build(**kwargs)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} gave a {type(model).__name__}, not a torch.nn.Module")
    if file is not None and is_compressed(file):
        raise CheckpointError(
            f"{file} holds a compressed network, not weights of {spec}: load_compressed(model, file) returns it, and "
            "finetune, evaluate and bench take it"
        )
    if file is not None:
        load_weights(model, file)
    return model.eval()


def default_input_shape(spec: str, model: nn.Module) -> tuple[int, ...] | None:
    """Return the input shape, without the batch, that the model of `spec` is made for; None if nothing tells.

    A zoo network, or one of the user's, tells by its attribute `default_input_shape`, timm and torchvision by the
    settings of their weights.
    """
    source, name = _split(spec)
    if source == "timm":
        size = getattr(model, "pretrained_cfg", {}).get("input_size")
    elif source == "torchvision":
        best = _torchvision(spec).get_model_weights(name).DEFAULT
        # the transformers of torchvision are built for one size, their argument
        side = getattr(model, "image_size", None) or best.transforms.keywords["crop_size"]
        size = (3, side, side)
    else:
        size = getattr(model, "default_input_shape", None)
    return None if size is None else tuple(size)


def _split(spec: str) -> tuple[str, str]:
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise ModelError(f"unknown model {spec!r}: possible are zoo:NAME, torchvision:NAME, timm:NAME, MODULE:CALLABLE")
    return source, name


def _file_or_name(weights: str | Path | None) -> tuple[Path | None, str | None]:
    if weights is None:
        return None, None
    path = Path(weights).expanduser()
    names_a_file = isinstance(weights, Path) or path.exists() or path.suffix or path.parent != Path()
    return (path, None) if names_a_file else (None, str(weights))


def _builder(spec: str, source: str, name: str, download: str | None) -> Callable[..., Any]:
    """Return what makes the model; names are checked here, so that what fails later is the construction."""
    if source == "torchvision":
        models = _torchvision(spec)
        weights = None if download is None else models.get_model_weights(name).__members__.get(download)
        if download is not None and weights is None:
            raise _no_weights(spec, download, models.get_model_weights(name).__members__)
        return lambda **kwargs: models.get_model(name, weights=weights, progress=False, **kwargs)
    if source == "timm":
        return _timm_builder(spec, name, download)
    if download is not None:
        raise ModelError(
            f"no weights {download!r} for {spec}: there is no such file, and only torchvision, timm and "
            "zoo:digits have weights of their own"
        )
    if source == "zoo":
        if name not in _ZOO:
            raise _unknown(spec, name, _ZOO)
        return _ZOO[name]
    return _user_callable(spec, source, name)


def _torchvision(spec: str) -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise ModelError(f"{spec} needs torchvision: pip install 'kronsearch[vision]'") from error
    known = models.list_models(module=models)
    name = spec.partition(":")[2]
    if name not in known:
        if name in models.list_models():  # of another task
            home = models.get_model_builder(name).__module__.rpartition(".")[0]
            raise ModelError(
                f"{spec} is not among torchvision's plain classifiers: pass {home}:{name}, and --input-shape"
            )
        raise _unknown(spec, name, known)
    module: ModuleType = models
    return module


def _timm_builder(spec: str, name: str, download: str | None) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"{spec} needs timm: pip install 'kronsearch[vision]'") from error
    base, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{base}.*", pretrained=True)]
    if not timm.is_model(base) or (tag and tag not in tags):
        raise _unknown(spec, name, [*timm.list_models(), *(f"{base}.{known}" for known in tags)])
    if download is None:
        return lambda **kwargs: timm.create_model(name, **kwargs)
    if not tags or (download != "DEFAULT" and download not in tags):
        raise _no_weights(spec, download, ["DEFAULT", *tags] if tags else [])
    tagged = name if download == "DEFAULT" else f"{base}.{download}"
    return lambda **kwargs: timm.create_model(tagged, pretrained=True, **kwargs)


def _user_callable(spec: str, module_name: str, name: str) -> Callable[..., Any]:
    try:
        with working_directory_importable():
            found = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:
        raise ModelError(f"can't import {module_name} for the model {spec}: {_one_line(error)}") from error
    if not callable(found):
        raise ModelError(f"{module_name} has no callable {name!r}, which the model {spec} asks for")

    def build(**kwargs: Any) -> Any:
        with working_directory_importable():
            return found(**kwargs)

    return build


@contextmanager
def _same_random_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_INIT_SEED)  # not torch.manual_seed, which seeds the accelerators too
        yield


@contextmanager
def _construction(spec: str, download: str | None) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision's, on how it will initialise one day
            yield
    except OSError as error:
        if download is None:
            raise ModelError(f"can't make {spec}: {_one_line(error)}") from error
        raise ModelError(
            f"can't download the weights {download} of {spec} ({_one_line(error)}); give a file instead"
        ) from error
    except Exception as error:
        raise ModelError(f"can't make {spec}: {_one_line(error)}") from error


def _unknown(spec: str, name: str, known: Iterable[str]) -> ModelError:
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return ModelError(
        f"unknown model {spec!r}: " + (f"close to it are {', '.join(close)}" if close else "none is close")
    )


def _no_weights(spec: str, name: str, known: Iterable[str]) -> ModelError:
    possible = ", ".join(known) or "none"
    return ModelError(f"no weights {name!r} for {spec}: there is no such file, and its downloads are {possible}")


def _one_line(error: Exception) -> str:
    first = first_line(error)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
