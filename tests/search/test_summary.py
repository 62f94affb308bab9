import pandas as pd
import pytest

from kronsearch.progress import PhaseClock, Progress
from kronsearch.search.summary import Agreement, summarise

NAN = float("nan")


def table(**columns):
    count = len(columns["tuned_score"])
    known = {
        "trial": list(range(1, count + 1)),
        "state": ["complete"] * count,
        "slot": list(range(count)),
        "digest": list("abcdefgh"[:count]),
        "predicted_error": [1.0] * count,
        "tuned_state": [None if score != score else "complete" for score in columns["tuned_score"]],
    }
    return pd.DataFrame(known | columns)


def test_the_gain_is_over_the_plain_allocation_after_the_fine_tunes():
    summary = summarise(
        table(tuned_score=[0.5, NAN, 0.75, 0.5], tuned_divergence=[0.25, NAN, 0.125, 0.25], digest=list("abca")),
        winner=3,
    )
    assert (summary.trials, summary.failed, summary.finalists, summary.winner) == (4, 0, 2, 3)
    assert (summary.plain, summary.best) == (0.5, 0.75)
    assert (summary.plain_divergence, summary.best_divergence) == (0.25, 0.125)
    assert summary.agreements == ()


def test_a_plain_allocation_that_missed_the_budget_diverged_or_is_not_there_has_no_score():
    told = table(tuned_score=[NAN, 0.75], tuned_divergence=[NAN, 0.5], state=["pruned", "complete"])
    for trials, failed in ((told, 1), (told.assign(tuned_state=["pruned", "complete"]), 1), (told[1:], 0)):
        found = summarise(trials, winner=2)
        assert (found.plain, found.plain_divergence, found.best, found.failed) == (None, None, 0.75, failed)


def test_without_a_teacher_there_is_no_divergence():
    assert summarise(table(tuned_score=[0.5]), winner=1).best_divergence is None
    assert summarise(table(tuned_score=[0.5], tuned_divergence=[None]), winner=1).plain_divergence is None


def test_rank_correlations_are_of_different_plans_that_have_both():
    found = summarise(
        table(
            tuned_score=[0.5] * 7,
            digest=list("abcdefa"),  # the last is the first again
            predicted_error=[1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 1.0],
            divergence=[10.0, 30.0, 20.0, 40.0, 50.0, 60.0, 10.0],
            tuned_divergence=[5.0, 4.0, 3.0, 2.0, 1.0, NAN, 5.0],
        ),
        winner=5,
    )

    def spearman(*differences):  # of ranks
        n = len(differences)
        return pytest.approx(1 - 6 * sum(d * d for d in differences) / (n * (n * n - 1)))

    assert found.agreements == (
        Agreement("predicted_error", "divergence", spearman(1, 0, 2, 1, 1, 5), 6),
        Agreement("predicted_error", "tuned_divergence", spearman(4, 2, 0, 2, 4), 5),
        Agreement("divergence", "tuned_divergence", spearman(4, 1, 1, 2, 4), 5),
    )


def test_a_measure_that_is_the_same_for_all_orders_nothing():
    found = summarise(table(tuned_score=[0.5] * 6, divergence=[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), winner=1)
    assert found.agreements == ()


def test_a_phase_clock_adds_up_each_phase_and_passes_its_steps_on():
    told, now = [], iter([10.0, 11.0, 13.0, 17.0, 25.0, 31.0])
    phases = PhaseClock(told.append, clock=lambda: next(now))
    for phase in ("profile", "calibrate", "calibrate", "trials", "calibrate"):
        phases(Progress(phase=phase, done=0, total=1))
    assert phases.seconds == {"profile": 1.0, "calibrate": 2.0 + 4.0 + 6.0, "trials": 8.0}
    assert [step.phase for step in told] == ["profile", "calibrate", "calibrate", "trials", "calibrate"]
