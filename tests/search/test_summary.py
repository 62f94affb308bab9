import pandas as pd
import pytest

from kronsearch.progress import PhaseClock, Progress
from kronsearch.search.summary import Agreement, summarise


def table(**columns):
    count = len(columns["score"])
    known = {
        "trial": list(range(1, count + 1)),
        "state": ["complete"] * count,
        "slot": list(range(count)),
        "digest": list("abcdefgh"[:count]),
        "predicted_error": [1.0] * count,
    }
    return pd.DataFrame(known | columns)


def test_the_gain_is_over_the_plain_allocation():
    summary = summarise(table(score=[0.5, 0.75], divergence=[0.25, 0.125]), winner=2)
    assert (summary.trials, summary.pruned, summary.winner) == (2, 0, 2)
    assert (summary.plain, summary.best) == (0.5, 0.75)
    assert (summary.plain_divergence, summary.best_divergence) == (0.25, 0.125)
    assert summary.agreements == ()


def test_a_plain_allocation_that_was_pruned_has_no_score():
    found = summarise(table(score=[0.5, 0.75], divergence=[0.25, 0.5], state=["pruned", "complete"]), winner=2)
    assert (found.plain, found.plain_divergence, found.pruned) == (None, None, 1)


def test_where_there_were_finalists_the_gain_is_after_their_longer_fine_tune():
    nan = float("nan")
    longer = {"longer_score": [0.8, nan, 0.9, 0.8], "longer_divergence": [0.2, nan, 0.1, 0.2]}
    told = table(score=[0.5, 0.6, 0.75, 0.5], divergence=[0.25, 0.3, 0.125, 0.25], digest=list("abca"), **longer)
    told["longer_state"] = ["complete", None, "complete", "complete"]
    summary = summarise(told, winner=3)
    assert (summary.finalists, summary.plain, summary.best) == (2, 0.8, 0.9)
    assert (summary.plain_divergence, summary.best_divergence) == (0.2, 0.1)
    lost = told.assign(
        longer_state=["diverged", None, "complete", "diverged"],
        longer_score=[nan, nan, 0.9, nan],
        longer_divergence=nan,
    )
    summary = summarise(lost, winner=3)
    assert (summary.finalists, summary.plain, summary.best) == (2, None, 0.9)
    summary = summarise(lost, winner=2)  # as if all of them had diverged
    assert (summary.finalists, summary.plain, summary.best) == (2, 0.5, 0.6)


def test_without_data_or_teacher_there_is_no_divergence():
    assert summarise(table(score=[0.5]), winner=1).best_divergence is None
    assert summarise(table(score=[0.5], divergence=[None]), winner=1).plain_divergence is None


def test_rank_correlations_are_of_different_plans_and_the_last_column_of_those_that_ended():
    found = summarise(
        table(
            score=[0.5] * 7,
            state=["complete"] * 5 + ["pruned", "complete"],
            digest=list("abcdefa"),  # the last is the first again
            predicted_error=[1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 1.0],
            settled_divergence=[10.0, 30.0, 20.0, 40.0, 50.0, 60.0, 10.0],
            divergence=[5.0, 4.0, 3.0, 2.0, 1.0, 9.0, 5.0],
        ),
        winner=5,
    )

    def spearman(*differences):  # of ranks
        n = len(differences)
        return pytest.approx(1 - 6 * sum(d * d for d in differences) / (n * (n * n - 1)))

    assert found.agreements == (
        Agreement("predicted_error", "settled_divergence", spearman(1, 0, 2, 1, 1, 5), 6),
        Agreement("predicted_error", "divergence", spearman(4, 2, 0, 2, 4), 5),
        Agreement("settled_divergence", "divergence", spearman(4, 1, 1, 2, 4), 5),
    )


def test_a_measure_that_is_the_same_for_all_orders_nothing():
    found = summarise(table(score=[0.5] * 6, divergence=[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), winner=1)
    assert found.agreements == ()


def test_a_phase_clock_adds_up_each_phase_and_passes_its_steps_on():
    told, now = [], iter([10.0, 11.0, 13.0, 17.0, 25.0])
    phases = PhaseClock(told.append, clock=lambda: next(now))
    for phase in ("profile", "calibrate", "calibrate", "trials", "calibrate"):
        phases(Progress(phase=phase, done=0, total=1))
    assert phases.seconds == {"profile": 1.0, "calibrate": 2.0 + 4.0, "trials": 8.0}
    assert [step.phase for step in told] == ["profile", "calibrate", "calibrate", "trials", "calibrate"]
