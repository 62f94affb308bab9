import sys

import cmaes
import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from kronsearch.errors import StudyError
from kronsearch.search.sampling import SLOT, new_sampler
from kronsearch.search.study import SCORE, Study

NAMES = ("gp", "tpe", "cmaes", "random")
RANGES = {"x": FloatDistribution(-1, 1), "y": FloatDistribution(0, 4)}
COUNT = 15  # trials: CMA-ES, which has six in a generation here, learns of two


def given(slot):
    return {"x": 0.5, "y": 1.0} if slot < 2 else None


def opened(path, name, seed=0):
    return Study(f"sqlite:///{path}", "s", {"seed": seed}, seed=seed, sampler=name)


def run_trials(study, count):
    while len(study.finished()) < count:
        trial = study.ask(range(count), given)
        x, y = trial.suggest_float("x", -1, 1), trial.suggest_float("y", 0, 4)
        trial.set_user_attr(SCORE, x)
        study.tell(trial, x**2 + (y - 3) ** 2)
    return [trial.params for trial in study.finished()]


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])  # of the default it is told with the study's
def test_a_study_that_was_cut_off_is_the_one_without(tmp_path, name):
    whole = run_trials(opened(tmp_path / "whole.db", name), COUNT)
    for count in (4, 9):
        run_trials(cut := opened(tmp_path / "cut.db", name), count)
        cut.ask(range(COUNT), given).suggest_float("x", -1, 1)  # it gets a number, and no end
    assert run_trials(opened(tmp_path / "cut.db", name), COUNT) == whole
    assert whole[:2] == [given(0), given(1)]
    assert len({params["x"] for params in whole[2:]}) > COUNT // 2


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_draws_something_else(tmp_path, name):
    one, other = (run_trials(opened(tmp_path / f"{seed}.db", name, seed), 4) for seed in (0, 1))
    assert one[:2] == other[:2]
    assert one[2] != other[2]


def add(study, slot, params, value, *, fixed=False, over=None):
    constraints = {} if over is None else {"constraints:macs": over}
    study.add_trial(
        optuna.create_trial(
            params=params,
            distributions=RANGES,
            value=value,
            user_attrs={SLOT: slot},
            system_attrs=({"fixed_params": params} if fixed else {}) | constraints,
        )
    )


def drawn(study, seed=5):
    return new_sampler("cmaes", seed).sample_relative(study, None, RANGES)


def test_the_evolution_is_told_whole_generations_of_drawn_trials_in_the_order_of_slots():
    places = np.random.default_rng(0).uniform(size=(7, 2))
    values = [3.0, 1.0, 6.0, 2.0, 5.0, 4.0, 0.5]
    study = optuna.create_study()
    add(study, 0, {"x": 0.0, "y": 0.0}, -9.0, fixed=True)
    for slot in (6, 1, 2, 3, 5, 4, 7):
        x, y = places[slot - 1]
        add(study, slot, {"x": 2 * x - 1, "y": 4 * y}, values[slot - 1])
    oracle = cmaes.CMA(np.full(2, 0.5), 1 / 6, bounds=np.array([[0.0, 1.0]] * 2), seed=5)
    assert oracle.population_size == 6
    oracle.tell(list(zip(places[:6], values[:6], strict=True)))
    x, y = oracle.ask()
    assert drawn(study) == pytest.approx({"x": 2 * x - 1, "y": 4 * y}, rel=1e-12)


def test_to_the_evolution_what_keeps_the_constraints_is_better_than_what_does_not():
    places = np.random.default_rng(1).uniform(size=(6, 2))
    values, over = [3.0, 1.0, 6.0, 2.0, 5.0, 4.0], [-0.5, 0.5, 0.0, 0.1, -0.1, 0.2]
    study = optuna.create_study()
    for slot, (x, y) in enumerate(places):
        add(study, slot, {"x": 2 * x - 1, "y": 4 * y}, values[slot], over=over[slot])
    oracle = cmaes.CMA(np.full(2, 0.5), 1 / 6, bounds=np.array([[0.0, 1.0]] * 2), seed=5)
    oracle.tell([(places[slot], rank) for rank, slot in enumerate((0, 4, 2, 3, 5, 1))])
    x, y = oracle.ask()
    assert drawn(study) == pytest.approx({"x": 2 * x - 1, "y": 4 * y}, rel=1e-12)


def test_nothing_of_the_evolution_is_kept_in_the_storage(tmp_path):
    """Optuna's own keeps a pickle there, which would be obeyed when it is read."""
    study = opened(tmp_path / "a.db", "cmaes")
    run_trials(study, 10)
    kept = {key for trial in study.finished() for key in trial.system_attrs}
    assert kept <= {"fixed_params"}


def test_without_its_package_the_evolution_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(StudyError, match=r"pip install 'kronsearch\[cmaes\]', or choose gp, tpe or random"):
        new_sampler("cmaes", 0)
