import io

import pytest
from rich.console import Console

from kronsearch.tables import console_for, duration, one_line


@pytest.mark.parametrize(
    ("text", "line"), [("a\nb\t c ", "a b c"), ("\x1b[31m", "?[31m"), ("é ⊗ ×", "é ⊗ ×"), (ValueError("x\r\ny"), "x y")]
)
def test_one_line(text, line):
    assert one_line(text) == line


def test_a_terminal_keeps_its_width():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert console_for(Terminal()).width == Console(file=Terminal()).width
    assert console_for(io.StringIO()).width > 120


def test_where_stdout_was_closed_nothing_is_printed(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    console_for().print("nothing")


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0s"), (59.4, "59s"), (59.5, "1m00s"), (3599.6, "1h00m"), (7322, "2h02m")]
)
def test_a_duration_is_told_as_people_write_it(seconds, told):
    assert duration(seconds) == told
