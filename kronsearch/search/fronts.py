"""The files of a front: a table, and a plan for each of its points."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from kronsearch.files import make_folder, replacing
from kronsearch.plan import Plan, save_plan

__all__ = ["make_plans_folder", "plan_name", "save_front"]

_PLANS = "plans"
_OURS = ("flops-", "params-", "latency-", "trial-")  # how names of a front's plans begin


def plan_name(words: str) -> str:
    """Return the name of a plan's file below the folder of its front, such as `plans/flops-28.42pct-params-1M.json`.

    The words begin with the name of a bound, or with `trial`.
    """
    assert words.startswith(_OURS), words
    return f"{_PLANS}/{words.replace('%', 'pct').replace(' ', '')}.json"


def make_plans_folder(folder: Path) -> None:
    """Make the folder that plans are written to; FileError if that can't be done."""
    make_folder(folder / _PLANS)


def save_front(plans: Mapping[str, Plan], table: pd.DataFrame, folder: Path) -> None:
    """Write the plans of a front, by their names, and its table as `front.csv`; those of an earlier front go."""
    make_plans_folder(folder)
    for name, plan in plans.items():
        save_plan(plan, folder / name)
    with replacing(folder / "front.csv") as path:
        table.to_csv(path, index=False)
    for path in sorted((folder / _PLANS).glob("*.json")):
        if path.name.startswith(_OURS) and f"{_PLANS}/{path.name}" not in plans:
            path.unlink()
