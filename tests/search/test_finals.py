import math

import pandas as pd
import pytest

from kronsearch.errors import StudyError
from kronsearch.plan import Score
from kronsearch.search.finals import TUNED, Finals
from kronsearch.search.study import DIGEST, OVER, PLAN, SCORE, Study
from kronsearch.training.evaluate import Evaluation

SEED = 3
ERROR = 0.05
IDENTITY = {"model": "m"}


class Told:
    """Stands for a scorer: hands out the score and the divergence that were thought up for each network built."""

    def __init__(self, *told, error=ERROR):
        self.left, self.built, self._error = list(told), [], error

    def build(self, specs):
        self.built.append(specs)
        return "network"

    def proxy(self, network, seed):
        assert (network, seed) == ("network", SEED)
        score, divergence = self.left.pop(0)
        return Evaluation(score, 1.0, divergence, 100, self._error)


@pytest.fixture
def opened(tmp_path):
    """Return what opens the study of a search and its finals, the same each time."""

    def open_both(identity=IDENTITY, *, objectives=1, higher_is_better=True):
        study = Study(f"sqlite:///{tmp_path / 'a.db'}", "s", identity, seed=SEED, objectives=objectives)
        return study, Finals(study, higher_is_better=higher_is_better)

    return open_both


@pytest.fixture
def finals_of(opened, plan):
    """Return what adds trials of (digest, divergence[, cost]), the plain allocation first; None is over the budget."""

    def make(*told, **settings):
        study, finals = opened(objectives=len(told[0]) - 1, **settings)
        for digest, *values in told:
            trial = study.ask(range(100), lambda _: None)
            if values[0] is None:
                trial.set_user_attr(OVER, 0.25)
            else:
                trial.set_user_attr(PLAN, plan.model_dump_json())
                trial.set_user_attr(DIGEST, digest)
            trial.set_user_attr(SCORE, 0.75)
            study.tell(trial, *(value or 0.0 for value in values))
        return finals

    return make


def play(finals, scorer):
    """Score what is left of the finalists."""
    told = []
    while (trial := finals.ledger.ask(finals.slots, lambda _: None)) is not None:
        told.append(finals.score(trial, scorer, SEED))
    return told


def test_the_plain_allocation_and_the_four_best_others_are_finalists(finals_of):
    others = ("a", 0.4), ("b", 0.3), ("c", None), ("d", 0.2), ("e", 0.5), ("f", 0.1)
    assert finals_of(("plain", 0.9), *others).slots == ["plain", "f", "d", "b", "a"]


def test_a_plan_that_several_trials_came_to_is_one_finalist(finals_of):
    assert finals_of(("plain", 0.3), ("a", 0.2), ("a", 0.2), ("plain", 0.3)).slots == ["plain", "a"]


def test_the_first_of_the_trials_that_came_to_a_plan_owns_it(finals_of):
    finals = finals_of(("plain", 0.3), ("a", 0.2), ("a", 0.2), ("plain", 0.3))
    play(finals, Told((0.5, 0.25), (0.5, 0.25)))
    assert sorted(finalist.trial.number for finalist in finals.finalists()) == [0, 1]


def test_a_plain_allocation_that_can_not_win_is_no_finalist_and_nobody_takes_its_place(finals_of):
    told = [(name, divergence) for divergence, name in enumerate("abcde", start=1)]
    assert finals_of(("plain", None), *told).slots == ["a", "b", "c", "d"]


def test_of_two_objectives_the_front_goes_to_the_finals(finals_of):
    finals = finals_of(("plain", 0.5, 0.5), ("a", 0.6, 0.5), ("b", 0.2, 0.9), ("c", 0.9, 0.2), ("d", 0.95, 0.3))
    assert sorted(finals.slots) == ["b", "c", "plain"]
    play(finals, Told((0.5, 0.25), (0.5, math.nan), (0.5, 0.75)))
    assert len(finals.finalists()) == 2
    assert {each.trial.user_attrs[DIGEST] for each in finals.finalists()} <= {"b", "c", "plain"}


def test_where_all_are_over_the_budget_nobody_wins(finals_of):
    finals = finals_of(("plain", None))
    assert finals.slots == []
    assert finals.winner() is None


def test_the_winner_is_the_best_after_the_fine_tune(finals_of, opened, plan):
    finals = finals_of(("plain", 0.9), ("a", 0.4), ("b", 0.3))
    scorer = Told((0.5, 0.25), (0.5, 0.2), (0.53, 0.125))  # of the plain allocation, b and a
    assert play(finals, scorer) == [
        "trial 0 scored 0.5000, divergence 0.25",
        "trial 2 scored 0.5000, divergence 0.2",
        "trial 1 scored 0.5300, divergence 0.125",
    ]
    assert scorer.built == [plan.replaced] * 3
    won = finals.winner()
    assert (won.trial.number, won.trial.value, won.measured.value) == (1, 0.4, 0.125)
    assert won.score("accuracy") == Score(metric="accuracy", value=0.53, examples=100)
    table, trials = finals.table(), opened()[0].table()
    assert table[f"{TUNED}divergence"].tolist() == [0.25, 0.125, 0.2]
    assert table[f"{TUNED}score"].tolist() == [0.5, 0.53, 0.5]
    assert table[trials.columns.tolist()].equals(trials)


@pytest.mark.parametrize(
    ("plain", "a", "b", "error", "winner"),
    [
        ((0.890, 0.1), (0.905, 0.3), (0.901, 0.2), 0.006, 2),
        ((0.890, 0.1), (0.905, 0.2), (0.901, 0.3), 0.006, 1),
        ((0.7, 0.2), (0.7, 0.2), (0.7, 0.2), 0.0, 0),
        ((0.7, 0.3), (0.7, 0.2), (0.7, 0.2), 0.0, 1),
    ],
)
def test_of_scores_within_the_standard_error_the_least_divergence_wins_and_of_equals_the_first(
    finals_of, plain, a, b, error, winner
):
    finals = finals_of(("plain", 0.9), ("a", 0.3), ("b", 0.4))
    play(finals, Told(plain, a, b, error=error))
    assert finals.winner().trial.number == winner


def test_a_score_that_is_better_beyond_its_error_wins_over_a_smaller_divergence(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    play(finals, Told((0.8, 0.25), (0.5, 0.125)))
    assert finals.winner().trial.number == 0


def test_where_lower_is_better_the_lowest_score_wins(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4), higher_is_better=False)
    play(finals, Told((0.8, 0.125), (0.5, 0.25)))
    assert finals.winner().trial.number == 1


def test_a_finalist_that_diverges_does_not_win(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    assert play(finals, Told((0.5, 0.5), (0.5, math.nan))) == [
        "trial 0 scored 0.5000, divergence 0.5",
        "trial 1 diverged",
    ]
    assert finals.winner().trial.number == 0
    table = finals.table()
    assert table[f"{TUNED}state"].tolist() == ["complete", "pruned"]
    assert pd.isna(table[f"{TUNED}divergence"][1])


def test_where_all_finalists_diverge_nobody_wins(finals_of):
    finals = finals_of(("plain", 0.9), ("a", 0.4))
    play(finals, Told((0.5, math.nan), (0.5, math.nan)))
    assert finals.winner() is None
    assert finals.slots == []


def test_those_that_diverge_leave_their_places_to_the_next_best(finals_of):
    finals = finals_of(("plain", 0.9), *[(name, 0.1 * place) for place, name in enumerate("abcdef", start=1)])
    told = play(finals, Told((0.5, math.nan), (0.5, math.nan), *[(0.5, 0.5)] * 4))
    assert told[:2] == ["trial 0 diverged", "trial 1 diverged"]
    assert len(told) == 6
    assert finals.slots == ["b", "c", "d", "e"]


def test_finals_are_resumed_and_more_trials_bring_only_new_finalists(finals_of, opened):
    others = [(name, 0.4 - 0.01 * place) for place, name in enumerate("abcd")]
    finals = finals_of(("plain", 0.9), *others)
    finals.score(finals.ledger.ask(finals.slots, lambda _: None), Told((0.5, 0.25)), SEED)
    again = opened()[1]
    assert again.ledger.left(again.slots) == ["d", "c", "b", "a"]
    play(again, Told((0.5, 0.2), (0.5, 0.2), (0.5, 0.2), (0.5, 0.125)))
    more = finals_of(("e", 0.1))
    assert (more.slots, more.ledger.left(more.slots)) == (["plain", "e", "d", "c", "b"], ["e"])
    play(more, Told((0.5, 0.15)))
    assert more.winner().trial.number == 1  # it is no finalist any more, and the best that was measured all the same


def test_what_was_measured_for_a_study_that_is_gone_is_of_no_account(finals_of):
    other = finals_of(("plain", 0.9), ("a", 0.4))
    trial = other.ledger.ask(["gone"], lambda _: None)
    trial.set_user_attr(SCORE, 1.0)
    other.ledger.tell(trial, 0.0)
    play(other, Told((0.5, 0.25), (0.5, 0.125)))
    assert other.winner().trial.number == 1


def test_finals_of_other_settings_are_refused(finals_of, tmp_path):
    play(finals_of(("plain", 0.9)), Told((0.5, 0.25)))
    elsewhere = Study(f"sqlite:///{tmp_path / 'a.db'}", "t", {"model": "n"}, seed=SEED)
    elsewhere.name = "s"
    with pytest.raises(StudyError, match=r"'s finals' .* was made with other settings \(model was m, is n\)"):
        Finals(elsewhere, higher_is_better=True)
