"""The names and numbers that a search lets choose. No torch here: they are checked before anything is imported."""

from typing import Literal, get_args

from kronsearch.errors import StudyError

__all__ = [
    "DecoderName",
    "ObjectiveName",
    "SamplerName",
    "SensitivityName",
    "check_choices",
    "check_counts",
    "check_length",
    "check_seed",
]

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


def check_counts(**numbers: object) -> None:
    """Raise `StudyError` unless each of these numbers, given by what it is called, is a whole one above zero."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise StudyError(f"{name.replace('_', ' ')} {number!r} is asked for: ask for a whole number above zero")


def check_length(trials: int, timeout: float | None) -> None:
    """Raise `StudyError` unless a search can have so many trials, and end after so many seconds."""
    check_counts(trials=trials)
    if timeout is not None and not (isinstance(timeout, int | float) and timeout >= 0):
        raise StudyError(f"a timeout of {timeout!r} seconds is asked for: ask for a number of 0 or more")


def check_seed(seed: int) -> None:
    """Raise `StudyError` unless this is a seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise StudyError(f"a seed of {seed!r} is asked for: ask for a whole number from 0 to 2**63 - 1")
