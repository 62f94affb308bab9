"""The errors that a user can cause; the command line prints each as one line and ends with exit code 2."""

from collections.abc import Mapping

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "FileError",
    "KronsearchError",
    "ModelError",
    "PlanError",
    "SpaceError",
    "SpecError",
    "StudyError",
    "TrainingError",
    "check_kind",
    "differences",
    "first_line",
]


class KronsearchError(Exception):
    """Base of all errors a user can cause.

    The message is one line: what was asked, why it can't be, and what is possible instead.
    """


class SpecError(KronsearchError, ValueError):
    """A sequence of Kronecker factors, or its ranks, does not describe the kernel it is meant for."""


class BudgetError(KronsearchError, ValueError):
    """A budget is malformed, can't be reached, or asks for nothing."""


class PlanError(KronsearchError, ValueError):
    """A plan file is malformed, of another schema, or made for another network."""


class SpaceError(KronsearchError, ValueError):
    """A search space is malformed or unknown."""


class ModelError(KronsearchError, ValueError):
    """A model specification is unknown, or the model can't be run or measured."""


class CheckpointError(KronsearchError, ValueError):
    """A checkpoint is unreadable, or doesn't fit the model."""


class DataError(KronsearchError, ValueError):
    """A data specification is unknown, or the data are missing or malformed."""


class FileError(KronsearchError, OSError):
    """A file can't be written."""


class StudyError(KronsearchError, ValueError):
    """A study can't be opened, or was made with other settings."""


class TrainingError(KronsearchError, ValueError):
    """A fine-tune has diverged, or can't be begun or resumed."""


def check_kind(what: str, value: object, kinds: type | tuple[type, ...], error: type[KronsearchError]) -> None:
    """Raise an error of one line unless a value is of a kind, or of one of several.

    Args:
        what: what it should be, such as "a budget is a Budget".
        value: what the caller passed.
        kinds: of values that will do.
        error: its class.
    """
    if not isinstance(value, kinds):
        raise error(f"{what}, not of type {type(value).__name__}")


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's error says, for a line of ours."""
    return str(error).strip().partition("\n")[0]


def differences(known: Mapping[str, object], given: Mapping[str, object]) -> str:
    """Return what differs between two identities, such as `seed was 0, is 1`; empty where nothing does."""
    shared = known.keys() & given.keys()
    differing = [key for key in {**known, **given} if key not in shared or known[key] != given[key]]
    return "; ".join(f"{key} was {known.get(key)}, is {given.get(key)}" for key in differing)
