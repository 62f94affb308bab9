import multiprocessing
import os
import signal

import pytest
from optuna.trial import TrialState

from kronsearch.errors import StudyError
from kronsearch.search.study import SCORE, Study

IDENTITY = {"model": "m", "budget": "flops 50%", "seed": 0}


def opened(path, identity=IDENTITY, *, seed=0):
    return Study(f"sqlite:///{path}", "s", identity, higher_is_better=True, seed=seed)


def no_given(_):
    return None


def run_trials(study, count):
    values = []
    while len(study.finished()) < count:
        trial = study.ask(no_given)
        x = trial.suggest_float("x", -1, 1)
        y = trial.suggest_float("y", -1, 1)
        study.tell(trial, x**2 + y)
        values.append((x, y))
    return values


def test_a_resumed_study_asks_what_it_would_have_asked(tmp_path):
    whole = run_trials(opened(tmp_path / "a.db"), 14)
    first = run_trials(opened(tmp_path / "b.db"), 9)
    assert first + run_trials(opened(tmp_path / "b.db"), 14) == whole


def test_another_seed_asks_something_else(tmp_path):
    assert run_trials(opened(tmp_path / "a.db"), 2) != run_trials(opened(tmp_path / "b.db", seed=1), 2)


def die_in_a_trial(path):
    study = opened(path)
    run_trials(study, 3)
    trial = study.ask(no_given)
    trial.suggest_float("x", -1, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_workers_trial_is_asked_again_and_nothing_finished_is_lost(tmp_path):
    worker = multiprocessing.get_context("spawn").Process(target=die_in_a_trial, args=(tmp_path / "a.db",))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    study = opened(tmp_path / "a.db")
    assert len(study.finished()) == 3
    assert [trial.state for trial in study._study.get_trials(deepcopy=False)][3:] == [TrialState.FAIL]
    run_trials(study, 8)
    run_trials(other := opened(tmp_path / "b.db"), 8)
    assert [trial.params for trial in study.finished()] == [trial.params for trial in other.finished()]


def test_given_trials_come_first_also_after_a_kill(tmp_path):
    given = [{"x": 0.25}, {"x": 0.5}]

    def by_index(index):
        return given[index] if index < 2 else None

    study = opened(tmp_path / "a.db")
    assert study.ask(by_index).suggest_float("x", -1, 1) == 0.25  # asked, never told: the worker is gone
    study = opened(tmp_path / "a.db")
    for expected in (0.25, 0.5):
        trial = study.ask(by_index)
        assert trial.suggest_float("x", -1, 1) == expected
        study.tell(trial, 1.0)
    assert len(study.finished()) == 2


def scored(study, *results):
    """Run a trial for each (score, standard error, divergence); None for one that is pruned."""
    for result in results:
        trial = study.ask(no_given)
        if result is not None:
            trial.set_user_attr(SCORE, result[0])
            trial.set_user_attr("error", result[1])
        study.tell(trial, None if result is None else result[2])
    return study


def test_the_best_is_the_first_of_equals_and_pruned_trials_count_as_finished(tmp_path):
    study = opened(tmp_path / "a.db")
    assert study.best() is None
    scored(study, (0.5, 0, 1.0), None, (0.7, 0, 1.0), (0.7, 0, 1.0))
    assert study.best().number == 2
    assert len(study.finished()) == 4
    table = study.table()
    assert table["state"].tolist() == ["complete", "pruned", "complete", "complete"]
    assert table["score"].dropna().tolist() == [0.5, 0.7, 0.7]


def test_where_lower_is_better_the_best_has_the_lowest_score(tmp_path):
    study = Study(f"sqlite:///{tmp_path / 'a.db'}", "s", IDENTITY, higher_is_better=False, seed=0)
    assert scored(study, (0.5, 0, 1.0), (0.3, 0, 2.0), (0.4, 0, 3.0)).best().number == 1


def test_of_scores_within_the_standard_error_the_least_divergence_wins(tmp_path):
    study = scored(
        opened(tmp_path / "a.db"), (0.890, 0.006, 0.1), (0.901, 0.006, 0.4), (0.905, 0.006, 0.3), (0.9, 0.006, 0.2)
    )
    assert study.best().number == 3


def test_a_score_without_a_fault_is_not_beyond_doubt(tmp_path):
    study = scored(opened(tmp_path / "a.db"), (1.0, 0.0, 0.3), (0.9996, 0.0004, 0.2), (0.9984, 0.0007, 0.1))
    assert study.best().number == 1


def test_the_sampler_comes_near_to_the_least_divergence(tmp_path):
    """And not to the best score, which here is at the other end."""
    study = opened(tmp_path / "a.db")
    while len(study.finished()) < 40:
        trial = study.ask(no_given)
        x = trial.suggest_float("x", -1, 1)
        trial.set_user_attr(SCORE, x)
        study.tell(trial, x**2)
    late = [abs(trial.params["x"]) for trial in study.finished()[20:]]
    assert sum(late) / len(late) < 0.35  # of a random sampler: 0.5


def test_another_identity_is_refused_with_what_differs(tmp_path):
    opened(tmp_path / "a.db")
    with pytest.raises(StudyError, match=r"\(budget was flops 50%, is params 20%\)") as caught:
        opened(tmp_path / "a.db", {**IDENTITY, "budget": "params 20%"})
    assert "\n" not in str(caught.value)


def test_a_study_with_another_objective_is_refused(tmp_path):
    """As those are that an earlier version made, which had none in their identity."""
    opened(tmp_path / "a.db")
    with pytest.raises(StudyError, match=r"\(objective was None, is divergence\)"):
        opened(tmp_path / "a.db", {**IDENTITY, "objective": "divergence"})


def test_a_study_of_somebody_elses_is_refused(tmp_path):
    import optuna

    url = f"sqlite:///{tmp_path / 'a.db'}"
    optuna.create_study(storage=url, study_name="s").ask()
    with pytest.raises(StudyError, match="is not kronsearch's"):
        opened(tmp_path / "a.db")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/study.db", "mysql+nodriver://host/db"])
def test_a_storage_that_cannot_be_opened_is_one_line(url):
    with pytest.raises(StudyError, match="can't open the storage") as caught:
        Study(url, "s", IDENTITY, higher_is_better=True, seed=0)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "a.db").write_text("not a database, but long enough to be looked at by SQLite as one" * 30)
    with pytest.raises(StudyError, match="can't open the storage"):
        opened(tmp_path / "a.db")
