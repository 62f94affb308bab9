"""The progress of a search or a sweep on stderr: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from kronsearch.budget import Budget, format_count, parse_amount
from kronsearch.tables import duration, one_line

if TYPE_CHECKING:
    from kronsearch.progress import Phase, Progress

__all__ = ["SearchView"]

_PHASES: "dict[Phase, str]" = {
    "profile": "measuring the model",
    "calibrate": "gathering statistics of activations",
    "tables": "error tables of layers",
    "sensitivity": "sensitivities of layers",
    "context": "contributions of layers",
    "latency": "timing candidates",
    "budgets": "budgets",
    "trials": "trials",
    "finalists": "fine-tuning finalists",
    "final": "fine-tuning the best",
    "apply": "applying the plan",
    "finetune": "fine-tuning",
    "test": "reading the test split",
}


class SearchView:
    """Shows each step of a search or a sweep: phase, how much is done, best score so far, budget used, time left.

    Call it with each `Progress`; as a context manager it opens and closes the live bar.

    Args:
        console: where to show it; a live bar if that is a terminal, else a line for each phase and each trial.
        budget: what the costs of the plan in hand are held against; None if there are many.
        timeout: seconds after which the trials end.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        console: Console,
        budget: Budget | None,
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._limits = (None, None) if budget is None else (budget.flops, budget.params)
        self._timeout = timeout
        self._clock = clock
        self._phase: Phase | None = None
        self._began = 0.0
        self._done_before = 0
        self._dense: tuple[int | None, int | None] = (None, None)
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: "Progress") -> None:
        """Show a step."""
        begins = progress.phase != self._phase
        if begins:
            self._phase, self._began, self._done_before = progress.phase, self._clock(), progress.done
        if progress.phase == "profile" and progress.macs is not None:
            self._dense = (progress.macs, progress.params)
        told = ", ".join(self._told(progress))
        if self._bar is not None:
            if self._task is None or begins:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(_PHASES[progress.phase], told=told)
            self._bar.update(self._task, completed=progress.done, total=progress.total, told=told)
        elif _is_news(progress) or (begins and progress.phase != "profile"):  # what is refused stays one line
            counted = f" {progress.done}/{progress.total}" if progress.total > 1 else ""
            self._console.print(f"{_PHASES[progress.phase]}{counted}{': ' * bool(told)}{told}", soft_wrap=True)

    def _told(self, progress: "Progress") -> list[str]:
        """Return what there is to tell besides the phase and the count, in parts."""
        told = []
        if progress.best is not None:
            trials = progress.phase == "trials"
            told.append(f"least divergence {progress.best:.4g}" if trials else f"best {progress.best:.4f}")
        for name, cost, written, dense in (
            ("MACs", progress.macs, self._limits[0], self._dense[0]),
            ("params", progress.params, self._limits[1], self._dense[1]),
        ):
            if cost is not None:
                told.append(f"{name} {format_count(cost)}{_of_limit(cost, written, dense)}")
        left = self._seconds_left(progress)
        if left is not None:
            told.append(f"{duration(left)} left")
        if progress.message:
            told.append(one_line(progress.message))
        return told

    def _seconds_left(self, progress: "Progress") -> float | None:
        """Return an estimate from the pace in this phase, cut off by the timeout, once there is a pace."""
        done, left = progress.done - self._done_before, progress.total - progress.done
        passed = self._clock() - self._began
        if done <= 0 or left <= 0:
            return None
        seconds = passed / done * left
        if progress.phase == "trials" and self._timeout is not None:
            seconds = min(seconds, max(0.0, self._timeout - passed))
        return seconds


def _is_news(progress: "Progress") -> bool:
    """Tell whether a step is worth a line by itself: a trial, a finalist, or an evaluation in a fine-tune."""
    phase = progress.phase
    return phase in ("trials", "finalists") or (phase in ("final", "finetune") and progress.best is not None)


def _of_limit(cost: int, written: str | int | None, dense: int | None) -> str:
    if written is None:
        return ""
    amount = parse_amount(written, name="flops")
    if amount.relative and dense is None:
        return ""
    limit = amount.of(dense or 0)
    return f" of {format_count(limit)} ({cost / limit:.1%})" if limit else ""
