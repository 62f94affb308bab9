"""The files of a front: a table, and a plan for each of its points."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from kronsearch.errors import FileError
from kronsearch.files import make_folder, replacing
from kronsearch.plan import Plan, save_plan

__all__ = ["make_plans_folder", "plan_name", "save_front"]

_PLANS, _TABLE = "plans", "front.csv"
_NAME = re.compile(rf"{_PLANS}/[^/\\]+\.json")


def plan_name(words: str) -> str:
    """Return the name of a plan's file below the folder of its front, such as `plans/flops-28.42pct-params-1M.json`."""
    return f"{_PLANS}/{words.replace('%', 'pct').replace(' ', '')}.json"


def make_plans_folder(folder: Path) -> None:
    """Make the folder that plans are written to; FileError if that can't be done."""
    make_folder(folder / _PLANS)


def save_front(plans: Mapping[str, Plan], table: pd.DataFrame, folder: Path) -> None:
    """Write the plans of a front, by their names, and its table as `front.csv`.

    The plans that the `front.csv` before it named go, but for those that are written anew.

    Raises:
        FileError: one of them can't be removed.
    """
    earlier = _named(folder / _TABLE)
    for name, plan in plans.items():
        save_plan(plan, folder / name)
    with replacing(folder / _TABLE) as path:
        table.to_csv(path, index=False)
    for name in sorted(earlier - set(plans)):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"can't remove {folder / name}, of an earlier front ({error.strerror})") from error


def _named(path: Path) -> set[str]:
    """Return the plans that a table of a front names; none if it is not there, or is no such table."""
    try:
        told = pd.read_csv(path, usecols=["plan"], dtype=str)["plan"]
    except (OSError, ValueError):  # pandas' own errors are of the latter kind
        return set()
    return {name for name in told.dropna() if _NAME.fullmatch(name)}
