import math

import pandas as pd
import pytest

from kronsearch.errors import StudyError
from kronsearch.search.finals import LONGER, Finals
from kronsearch.search.study import DIGEST, PLAN, SCORE, STOPPED, Study
from kronsearch.training.evaluate import Evaluation

SEED = 3
ERROR = 0.05
IDENTITY = {"model": "m"}


class Told:
    """Stands for a scorer: hands out the score and the divergence that were thought up for each network built."""

    def __init__(self, *told):
        self.left, self.built = list(told), []

    def build(self, specs):
        self.built.append(specs)
        return "network"

    def longer(self, network, seed):
        assert (network, seed) == ("network", SEED)
        score, divergence = self.left.pop(0)
        return Evaluation(score, 1.0, divergence, 100, ERROR)


@pytest.fixture
def opened(tmp_path):
    """Return what opens the study of a search and its finals, the same each time."""

    def open_both(identity=IDENTITY):
        study = Study(f"sqlite:///{tmp_path / 'a.db'}", "s", identity, higher_is_better=True, seed=SEED)
        return study, Finals(study, study.beside("finals"))

    return open_both


@pytest.fixture
def finals_of(opened, plan):
    """Return what adds trials of (digest, divergence[, score]), the plain allocation first; None was stopped."""

    def make(*told):
        study, finals = opened()
        for digest, divergence, *score in told:
            trial = study.ask(range(100), lambda _: None)
            trial.set_user_attr(PLAN, plan.model_dump_json())
            trial.set_user_attr(DIGEST, digest)
            trial.set_user_attr(SCORE, *(score or [0.5]))
            trial.set_user_attr("error", ERROR)
            if divergence is None:
                trial.set_user_attr(STOPPED, True)
            study.tell(trial, divergence or 0.0)
        return finals

    return make


def play(finals, scorer):
    """Score what is left of the finalists."""
    told = []
    while (trial := finals.ledger.ask(finals.slots, lambda _: None)) is not None:
        told.append(finals.score(trial, scorer, SEED))
    return told


def test_the_plain_allocation_and_the_two_best_others_are_finalists(finals_of):
    assert finals_of(("plain", 0.9), ("a", 0.4), ("b", 0.3), ("c", None), ("d", 0.2)).slots == ["plain", "d", "b"]


def test_a_plan_that_several_trials_came_to_is_one_finalist(finals_of):
    assert finals_of(("plain", 0.3), ("a", 0.2), ("a", 0.2), ("plain", 0.3)).slots == ["plain", "a"]


def test_a_plain_allocation_that_was_stopped_is_no_finalist_and_nobody_takes_its_place(finals_of):
    assert finals_of(("plain", None), ("a", 0.3), ("b", 0.2), ("c", 0.1)).slots == ["c", "b"]


def test_behind_a_lucky_score_the_divergence_orders_the_rest(finals_of):
    lucky = ("lucky", 0.5, 0.9)
    assert finals_of(("plain", 0.9), lucky, ("a", 0.4, 0.51), ("b", 0.1)).slots == ["plain", "lucky", "b"]


@pytest.mark.parametrize("told", [[("plain", 0.3)], [("plain", 0.3), ("plain", 0.3), ("a", None)]])
def test_where_there_is_one_plan_it_has_won(finals_of, opened, told):
    finals = finals_of(*told)
    assert finals.slots == []
    assert [trial.number for trial in finals.winner()] == [0, 0]
    assert finals.table().equals(opened()[0].table())


def test_where_all_were_stopped_nobody_wins(finals_of):
    assert finals_of(("plain", None)).winner() is None


def test_the_winner_is_the_best_after_the_longer_fine_tune(finals_of, opened, plan):
    finals = finals_of(("plain", 0.9), ("a", 0.4), ("b", 0.3))
    scorer = Told((0.5, 0.25), (0.5, 0.2), (0.53, 0.125))  # of the plain allocation, b and a
    assert play(finals, scorer) == [
        "trial 0 scored 0.5000, divergence 0.25",
        "trial 2 scored 0.5000, divergence 0.2",
        "trial 1 scored 0.5300, divergence 0.125",
    ]
    assert scorer.built == [plan.replaced] * 3
    won, measured = finals.winner()
    assert (won.number, won.value) == (1, 0.4)
    assert (measured.value, measured.user_attrs[SCORE], measured.user_attrs["examples"]) == (0.125, 0.53, 100)
    table, trials = finals.table(), opened()[0].table()
    assert table[f"{LONGER}divergence"].tolist() == [0.25, 0.125, 0.2]
    assert table[f"{LONGER}score"].tolist() == [0.5, 0.53, 0.5]
    assert table[trials.columns.tolist()].equals(trials)


def test_a_score_that_is_better_beyond_its_error_wins_over_a_smaller_divergence(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    play(finals, Told((0.8, 0.25), (0.5, 0.125)))
    assert finals.winner().trial.number == 0


def test_a_finalist_that_diverges_does_not_win(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    assert play(finals, Told((0.5, 0.5), (0.5, math.nan))) == [
        "trial 0 scored 0.5000, divergence 0.5",
        "trial 1 diverged",
    ]
    assert finals.winner().trial.number == 0
    table = finals.table()
    assert table[f"{LONGER}state"].tolist() == ["complete", "diverged"]
    assert pd.isna(table[f"{LONGER}divergence"][1])


def test_where_all_finalists_diverge_the_best_trial_wins(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    play(finals, Told((0.5, math.nan), (0.5, math.nan)))
    assert [trial.number for trial in finals.winner()] == [1, 1]


def test_finals_are_resumed_and_more_trials_bring_only_new_finalists(finals_of, opened):
    finals = finals_of(("plain", 0.9), ("a", 0.4), ("b", 0.3))
    finals.score(finals.ledger.ask(finals.slots, lambda _: None), Told((0.5, 0.25)), SEED)
    again = opened()[1]
    assert again.ledger.left(again.slots) == ["b", "a"]
    play(again, Told((0.5, 0.2), (0.5, 0.125)))
    more = finals_of(("c", 0.1))
    assert (more.slots, more.ledger.left(more.slots)) == (["plain", "c", "b"], ["c"])
    play(more, Told((0.5, 0.15)))
    assert more.winner().trial.number == 1  # it is no finalist any more, and the best that was measured all the same


def test_what_was_measured_for_a_study_that_is_gone_is_of_no_account(finals_of):
    other = finals_of(("plain", 0.9), ("a", 0.4))
    trial = other.ledger.ask(["gone"], lambda _: None)
    trial.set_user_attr(SCORE, 1.0)
    other.ledger.tell(trial, 0.0)
    play(other, Told((0.5, 0.25), (0.5, 0.125)))
    assert other.winner().trial.number == 1


def test_finals_of_other_settings_are_refused(finals_of, opened, tmp_path):
    finals_of(("plain", 0.9))
    elsewhere = Study(f"sqlite:///{tmp_path / 'a.db'}", "t", {"model": "n"}, higher_is_better=True, seed=SEED)
    elsewhere.name = "s"
    with pytest.raises(StudyError, match=r"'s finals' .* was made with other settings \(model was m, is n\)"):
        elsewhere.beside("finals")
