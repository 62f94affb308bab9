"""The names of what a search lets choose. No torch here: the command line checks them before anything is imported."""

from typing import Literal, get_args

from kronsearch.errors import StudyError

__all__ = ["DecoderName", "ObjectiveName", "SamplerName", "SensitivityName", "check_choices"]

DecoderName = Literal["allocate", "direct"]
ObjectiveName = Literal["score", "pareto"]
SamplerName = Literal["gp", "tpe", "cmaes", "random"]
SensitivityName = Literal["measured", "fisher", "inputs", "absolute", "plain"]
_CHOICES = {
    "decoder": get_args(DecoderName),
    "sampler": get_args(SamplerName),
    "sensitivity": get_args(SensitivityName),
}


def check_choices(**names: str) -> None:
    """Raise `StudyError` for a name that there is not, given as `decoder=…`, `sampler=…` or `sensitivity=…`."""
    for kind, name in names.items():
        if name not in _CHOICES[kind]:
            raise StudyError(f"there is no {kind} {name!r}: choose one of {', '.join(_CHOICES[kind])}")
