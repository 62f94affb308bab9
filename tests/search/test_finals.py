import math

import pandas as pd
import pytest

from kronsearch.search.finals import LONGER, Finals
from kronsearch.search.study import PLAN, SCORE, STOPPED, Study
from kronsearch.training.evaluate import Evaluation

SEED = 3


class Told:
    """Stands for a scorer: hands out the divergence that was thought up for each network built."""

    def __init__(self, *divergences):
        self.left, self.built = list(divergences), []

    def build(self, specs):
        self.built.append(specs)
        return "network"

    def longer(self, network, seed):
        assert (network, seed) == ("network", SEED)
        yield Evaluation(0.5, 1.0, self.left.pop(0), 100, 0.05)


@pytest.fixture
def opened(tmp_path):
    """Return what opens the study of a search, the same each time."""
    return lambda: Study(f"sqlite:///{tmp_path / 'a.db'}", "s", {"model": "m"}, higher_is_better=True, seed=SEED)


@pytest.fixture
def trials(opened, plan):
    """Return what makes trials of (digest, divergence), the plain allocation first; a divergence of None is stopped."""

    def make(*told):
        study = opened()
        for digest, divergence in told:
            trial = study.ask(range(100), lambda _: None)
            trial.set_user_attr(PLAN, plan.model_dump_json())
            trial.set_user_attr("digest", digest)
            trial.set_user_attr(SCORE, 0.5)
            trial.set_user_attr("error", 0.05)
            if divergence is None:
                trial.set_user_attr(STOPPED, True)
            study.tell(trial, divergence or 0.0)
        return study

    return make


def run(finals, scorer):
    """Score what is left of the finalists."""
    told = []
    while (trial := finals.ledger.ask(finals.slots, lambda _: None)) is not None:
        told.append(finals.score(trial, scorer, SEED))
    return told


def test_the_plain_allocation_and_the_two_best_others_are_finalists(trials):
    study = trials(("plain", 0.9), ("a", 0.4), ("b", 0.3), ("c", None), ("d", 0.2))
    assert Finals.of(study).slots == (0, 4, 2)


def test_of_plans_that_several_trials_came_to_one_trial_is_a_finalist(trials):
    assert Finals.of(trials(("plain", 0.3), ("a", 0.2), ("a", 0.2), ("plain", 0.3))).slots == (0, 1)


def test_a_plain_allocation_that_was_stopped_is_no_finalist(trials):
    assert Finals.of(trials(("plain", None), ("a", 0.2), ("b", 0.1))).slots == (2, 1)


@pytest.mark.parametrize("told", [[("plain", 0.3)], [("plain", 0.3), ("plain", 0.3), ("a", None)]])
def test_where_there_is_one_plan_it_has_won(trials, told):
    finals = Finals.of(study := trials(*told))
    assert (finals.slots, finals.ledger) == ((), None)
    assert [trial.number for trial in finals.winner] == [0, 0]
    assert finals.table(study.table()).equals(study.table())


def test_where_all_were_stopped_nobody_wins(trials):
    assert Finals.of(trials(("plain", None))).winner is None


def test_the_winner_is_the_best_after_the_longer_fine_tune(trials, plan):
    finals = Finals.of(study := trials(("plain", 0.9), ("a", 0.4), ("b", 0.3)))
    scorer = Told(0.25, 0.2, 0.125)  # of the plain allocation, b and a
    assert run(finals, scorer) == [
        "trial 0 scored 0.5000, divergence 0.25",
        "trial 2 scored 0.5000, divergence 0.2",
        "trial 1 scored 0.5000, divergence 0.125",
    ]
    assert scorer.built == [plan.replaced] * 3
    won, measured = finals.winner
    assert (won.number, won.value) == (1, 0.4)
    assert (measured.value, measured.user_attrs["divergence"]) == (0.125, 0.125)
    assert measured.user_attrs["examples"] == 100
    table = finals.table(study.table())
    assert table[f"{LONGER}divergence"].tolist() == [0.25, 0.125, 0.2]
    assert set(table) - set(study.table()) == {f"{LONGER}score", f"{LONGER}error", f"{LONGER}divergence"}


def test_a_finalist_that_diverges_does_not_win(trials):
    finals = Finals.of(study := trials(("plain", 0.9), ("a", 0.4)))
    assert run(finals, Told(0.5, math.nan)) == ["trial 0 scored 0.5000, divergence 0.5", "trial 1 pruned"]
    assert finals.winner[0].number == 0
    assert pd.isna(finals.table(study.table())[f"{LONGER}divergence"][1])


def test_where_all_finalists_diverge_the_best_trial_wins(trials):
    finals = Finals.of(trials(("plain", 0.9), ("a", 0.4)))
    run(finals, Told(math.nan, math.nan))
    assert [trial.number for trial in finals.winner] == [1, 1]


def test_finals_are_resumed_and_more_trials_bring_only_new_finalists(trials, opened):
    finals = Finals.of(trials(("plain", 0.9), ("a", 0.4), ("b", 0.3)))
    finals.score(finals.ledger.ask(finals.slots, lambda _: None), Told(0.25), SEED)
    again = Finals.of(opened())
    assert again.ledger.left(again.slots) == [2, 1]
    run(again, Told(0.2, 0.125))
    trials(("c", 0.1))
    more = Finals.of(opened())
    assert (more.slots, more.ledger.left(more.slots)) == ((0, 3, 2), [3])
    assert more.winner[0].number == 2  # what 1 was measured to be is of no account: it is no finalist any more
    run(more, Told(0.1))
    assert more.winner[0].number == 3
