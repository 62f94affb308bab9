import io

import pytest
from rich.console import Console

from kronsearch.budget import Budget
from kronsearch.progress import Progress
from kronsearch.tables import console_for
from kronsearch.watching import SearchView


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def view(stream: io.StringIO, clock: Clock, budget: Budget | None = None, timeout: float | None = None) -> SearchView:
    return SearchView(console_for(stream), budget or Budget(flops="1k"), timeout=timeout, clock=clock)


def test_without_a_terminal_a_line_for_each_phase_and_each_trial(stream, clock):
    with view(stream, clock) as watch:
        watch(Progress(phase="profile", done=0, total=1))
        watch(Progress(phase="tables", done=0, total=31))
        watch(Progress(phase="tables", done=1, total=31, message="conv1"))
        watch(Progress(phase="tables", done=31, total=31))
        watch(Progress(phase="trials", done=0, total=2, message="started"))
        clock.now = 5
        watch(Progress(phase="trials", done=1, total=2))
        watch(Progress(phase="trials", done=2, total=2, message="done"))
        watch(Progress(phase="test", done=0, total=1))
    assert stream.getvalue().splitlines() == [
        "error tables of layers 0/31",
        "trials 0/2: started",
        "trials 1/2: 5s left",
        "trials 2/2: done",
        "reading the test split",
    ]


def test_a_fine_tune_has_a_line_for_each_evaluation(stream, clock):
    with view(stream, clock) as watch:
        watch(Progress(phase="apply", done=0, total=1))
        watch(Progress(phase="finetune", done=40, total=100, best=0.9))  # resumed
        clock.now = 10
        watch(Progress(phase="finetune", done=50, total=100, message="loss 0.2"))
        watch(Progress(phase="finetune", done=60, total=100, message="epoch 6 scored 0.91", best=0.91))
    assert stream.getvalue().splitlines() == [
        "applying the plan",
        "fine-tuning 40/100: best 0.9000",
        "fine-tuning 60/100: best 0.9100, 20s left, epoch 6 scored 0.91",
    ]


def test_a_line_tells_best_budget_and_time_left(stream, clock):
    watch = view(stream, clock)
    watch(Progress(phase="trials", done=7, total=20))
    clock.now = 60
    watch(Progress(phase="trials", done=9, total=20, best=0.0123, macs=900, params=55, message="done"))
    # two trials in 60 seconds: eleven more take 330
    assert stream.getvalue().splitlines()[1] == (
        "trials 9/20: least divergence 0.0123, MACs 900 of 1 k (90.0%), params 55, 5m30s left, done"
    )


def test_a_timeout_cuts_the_time_left(stream, clock):
    watch = view(stream, clock, timeout=90)
    watch(Progress(phase="trials", done=0, total=20))
    clock.now = 60
    watch(Progress(phase="trials", done=1, total=20))
    assert "30s left" in stream.getvalue()


def test_hours_left(stream, clock):
    watch = view(stream, clock)
    watch(Progress(phase="trials", done=0, total=3))
    clock.now = 3600 + 90
    watch(Progress(phase="trials", done=1, total=3))
    assert "2h03m left" in stream.getvalue()


def test_a_relative_budget_is_told_once_the_dense_cost_is_known(stream, clock):
    watch = view(stream, clock, Budget(params="50%"))
    watch(Progress(phase="trials", done=0, total=2, params=40))
    watch(Progress(phase="profile", done=1, total=1, macs=1000, params=100))
    watch(Progress(phase="trials", done=1, total=2, params=40))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "trials 0/2: params 40"
    assert lines[1] == "trials 1/2: params 40 of 50 (80.0%)"


def test_messages_write_no_escape_codes(stream, clock):
    with view(stream, clock) as watch:
        watch(Progress(phase="trials", done=1, total=2, message="\x1b[31m\nred [bold]"))
    assert stream.getvalue() == "trials 1/2: ?[31m red [bold]\n"


def test_a_terminal_gets_a_bar_that_goes_away(stream, clock):
    console = Console(file=stream, force_terminal=True, width=120, markup=False)
    with SearchView(console, Budget(flops="1k"), clock=clock) as watch:
        watch(Progress(phase="profile", done=0, total=1))
        watch(Progress(phase="trials", done=1, total=2, best=0.5, message="[bold]"))
    text = stream.getvalue()
    assert "trials" in text
    assert "least divergence 0.5, [bold]" in text
    assert text.endswith("\x1b[2K")  # the line is erased at the end


def test_many_budgets_are_counted_and_costs_held_against_none(stream, clock):
    with SearchView(console_for(stream), None, clock=clock) as watch:
        watch(Progress(phase="profile", done=1, total=1, macs=1000, params=100))
        watch(Progress(phase="budgets", done=0, total=3))
        watch(Progress(phase="budgets", done=1, total=3, macs=40))
        watch(Progress(phase="trials", done=1, total=3, macs=40))
    assert stream.getvalue() == "budgets 0/3\ntrials 1/3: MACs 40\n"
