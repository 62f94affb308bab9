import math
from contextlib import contextmanager

import pytest

from kronsearch.search import sharing
from kronsearch.search.sharing import share


class Ledger:
    """Stands for a study, of which another worker has some slots and ends one of them each time it is looked at."""

    def __init__(self, others=()):
        self.finished, self.theirs, self.at, self.given = set(), list(others), None, {}

    def left(self, slots):
        return [slot for slot in slots if slot not in self.finished]

    def ask(self, slots, given):
        free = [slot for slot in self.left(slots) if slot not in self.theirs]
        if not free:
            return None
        self.given[free[0]] = given(free[0])
        return free[0]

    def others(self):
        running = list(self.theirs)
        if self.theirs:
            self.finished.add(self.theirs.pop(0))
        return running

    @contextmanager
    def at_work(self, trial):
        self.at = trial
        yield
        self.at = None


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sharing, "_PATIENCE", 0.0)


def shared(ledger, slots, **settings):
    """Return which trials were run, and what was told of others."""
    ran, told = [], []

    def run(trial):
        assert ledger.at == trial
        ran.append(trial)
        ledger.finished.add(trial)

    share(ledger, slots, run, lambda *counts: told.append(counts), **settings)
    return ran, told


def test_alone_every_slot_that_is_left_is_run_in_its_turn():
    ledger = Ledger()
    ledger.finished.add("b")
    assert shared(ledger, ["a", "b", "c"], given={"a": 1, "c": 3}.get) == (["a", "c"], [])
    assert ledger.given == {"a": 1, "c": 3}
    assert shared(ledger, ["a", "b", "c"]) == ([], [])


def test_others_trials_are_waited_for_and_that_is_told_once_for_each():
    assert shared(Ledger(others=[0, 1]), range(4)) == ([2, 3], [(2, 2), (1, 3)])


def test_what_does_not_end_is_told_of_once():
    ledger = Ledger(others=["elsewhere"] * 3 + [0])
    assert shared(ledger, [0, 1]) == ([1], [(4, 1)])


def test_when_time_is_over_one_trial_is_run_and_others_are_waited_for():
    assert shared(Ledger(), range(4), ends=-math.inf) == ([0], [])
    assert shared(Ledger(others=[0, 1]), range(4), ends=-math.inf) == ([2], [(2, 1), (1, 2)])
    assert shared(Ledger(), range(4), ends=math.inf) == ([0, 1, 2, 3], [])
