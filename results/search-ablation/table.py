"""The table of an ablation: means over the seeds, and differences from one arm in pairs of test images.

python table.py OUT
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

REFERENCE = "measured"  # what the others are compared with


def main() -> None:
    """Print a table for each budget."""
    out = Path(sys.argv[1])
    done = pd.read_csv(out / "rows.csv")
    settings = done[["model", "seconds", "epochs"]].drop_duplicates()
    assert len(settings) == 1, f"rows of several settings: {settings}"
    lines = []
    for budget, part in done.groupby("budget", sort=False):
        lines += [
            f"{budget}:",
            "",
            f"| arm | seeds | trials | test accuracy, % | minus {REFERENCE} | test divergence | minus {REFERENCE} |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm in part["arm"].unique():
            mine = part[part["arm"] == arm].sort_values("seed")
            told = mine["trials"].dropna() if "trials" in mine else []
            trials = ", ".join(str(int(count)) for count in told) or "–"
            right, apart = differences(out, part, mine)
            seeds, accuracy = ", ".join(map(str, mine["seed"])), each(100 * mine["accuracy"], 2)
            divergence = each(mine["divergence"], 4)
            lines.append(f"| {arm} | {seeds} | {trials} | {accuracy} | {right} | {divergence} | {apart} |")
        lines.append("")
    print("\n".join(lines))


def each(values: Iterable[float], digits: int) -> str:
    """Return the mean and, of several, each."""
    values = list(values)
    told = f"{np.mean(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def differences(out: Path, part: pd.DataFrame, mine: pd.DataFrame) -> tuple[str, str]:
    """Return the mean differences from the reference of the same seed, in points and in nats, ± standard errors."""
    pairs = {"right": [], "apart": []}
    for _, row in mine.iterrows():
        other = part[(part["arm"] == REFERENCE) & (part["seed"] == row["seed"])]
        if other.empty:
            return "", ""
        ours, theirs = (
            np.load(out / f"{digest}-{row['seed']}.npz") for digest in (row["digest"], other.iloc[0]["digest"])
        )
        for name, found in pairs.items():
            found.append(ours[name].astype(float) - theirs[name].astype(float))
    told = []
    for name, scale, digits in (("right", 100, 2), ("apart", 1, 4)):
        change = np.concatenate(pairs[name])
        told.append(f"{scale * change.mean():+.{digits}f} ± {scale * change.std() / np.sqrt(len(change)):.{digits}f}")
    return told[0], told[1]


if __name__ == "__main__":
    main()
