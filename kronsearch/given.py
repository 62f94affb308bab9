"""What the settings of a command stand for: the model, the data, the device, and the shape of an example.

What is slow to import is imported where it is needed, as in the commands.
"""

from typing import TYPE_CHECKING

import typer

from kronsearch.config import CONFIG_FILE, OptionError, Settings
from kronsearch.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from kronsearch.training.data import Data

__all__ = ["check_data", "data_of", "device_of", "input_shape_of", "model_of", "spec_of"]


def spec_of(settings: Settings) -> str:
    """Return the model's specification; OptionError where neither the line nor the settings file has it."""
    if settings.model is None:
        raise OptionError(
            "no --model given: pass --model SPEC (zoo:NAME, torchvision:NAME, timm:NAME or MODULE:CALLABLE), "
            f"or write it into {CONFIG_FILE}"
        )
    return settings.model


def device_of(settings: Settings) -> str:
    """Return where to compute; OptionError where this torch can't."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: there is no CUDA device that this torch can use; pass --device cpu")
    return settings.device


def model_of(settings: Settings, spec: str, *, warn: bool = True) -> "nn.Module":
    """Return the model with its weights; with `warn` it is told where there are none."""
    from kronsearch.models.loading import load_model

    model = load_model(spec, weights=settings.weights, args=settings.model_args)
    if warn and settings.weights is None and spec != "zoo:digits":
        typer.echo(f"warning: no --weights: those of {spec} are random, unless its code loads some", err=True)
    return model


def check_data(settings: Settings) -> None:
    """Raise OptionError where no data are given to a command that can't do without."""
    if settings.data is None:
        raise OptionError("no --data given: pass --data SPEC, such as digits or imagefolder:DIR")


def data_of(
    settings: Settings, plan: Plan | None, *, reseeded: bool = True, val_fraction: float | None = None
) -> "Data | None":
    """Return the data, split by the seed given, else by the plan's: what its search validated on is not trained on.

    Of that a smaller `val_fraction` leaves a part to be trained on, and holds out no other images. Of a command that
    has no option for a seed, what a settings file tells is no reason to split otherwise than a plan: not `reseeded`.
    """
    if settings.data is None:
        return None
    from kronsearch.training.sources import load_data

    given = plan is None or (reseeded and "seed" in settings.model_fields_set)
    seed = settings.seed if given or plan is None else plan.decomposition.seed
    return load_data(settings.data, seed=seed, val_fraction=val_fraction)


def input_shape_of(settings: Settings, spec: str, model: "nn.Module", data: "Data | None") -> tuple[int, ...]:
    """Return the shape of one example: as given, else the data's, else the one that the model was made for.

    OptionError where nothing tells.
    """
    from kronsearch.models.loading import default_input_shape

    shape = settings.input_shape or (data.input_shape if data is not None else default_input_shape(spec, model))
    if shape is None:
        raise OptionError(f"the input of {spec} is not known: pass --input-shape, such as 3,224,224, or --data")
    return shape
