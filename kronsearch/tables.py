"""What tables and lines for people are made of."""

import sys
from io import StringIO
from typing import IO

from rich.console import Console
from rich.table import Table

from kronsearch.budget import format_count

__all__ = ["FLOPS", "add_costs", "console_for", "duration", "new_table", "one_line", "sizes"]

FLOPS = "flops (MACs, as fvcore counts)"
_WIDTH_OF_FILES = 160


def console_for(stream: IO[str] | None = None) -> Console:
    """Return a console on a stream (stdout) that prints text as it is; what is no terminal gets wide, plain lines.

    A process whose stdout was closed has none: what is printed goes nowhere then.
    """
    stream = stream or sys.stdout or StringIO()
    width = None if stream.isatty() else _WIDTH_OF_FILES
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def one_line(text: object) -> str:
    """Return the text on one line; what can't be printed, such as escape codes of a foreign file, becomes `?`."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(text).split()))


def duration(seconds: float) -> str:
    """Return seconds as people write them, such as 1h05m, 2m00s or 7s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def sizes(shape: tuple[int, ...]) -> str:
    """Return sizes as people write them, such as 3×224×224."""
    return "×".join(map(str, shape))


def new_table(*texts: str, numbers: tuple[str, ...] = (), last: str | None = None) -> Table:
    """Return a table of columns of text, of numbers, and of text once more."""
    table = Table()
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, overflow="fold")
    return table


def add_costs(table: Table, dense: tuple[int, int], other: tuple[int, int]) -> None:
    """Add a line each for the MACs and the parameters of the dense network and of another."""
    for name, before, after in zip((FLOPS, "params"), dense, other, strict=True):
        table.add_row(name, format_count(before), format_count(after), _change(before, after))


def _change(before: int, after: int) -> str:
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f}× fewer" if after < before else f"{after / before:.2f}× more"
