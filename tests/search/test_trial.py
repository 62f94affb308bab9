import math

import optuna
import pytest
from optuna.trial import TrialState

from kronsearch.search.study import was_stopped
from kronsearch.search.trial import foretold, outcome, overstepped, score
from kronsearch.training.evaluate import Evaluation

SEED = 3


class Told:
    """Stands for a scorer: hands out evaluations that were thought up."""

    def __init__(self, settled, tuned=None):
        self._settled, self._tuned, self.built = settled, tuned, []

    def build(self, specs):
        self.built.append(specs)
        return "network"

    def settled(self, network):
        assert network == "network"
        return self._settled

    def proxy(self, network, seed):
        assert (network, seed) == ("network", SEED)
        assert self._tuned is not None, "it was to be stopped"
        return self._tuned


def evaluation(divergence, metric=0.5, loss=1.0):
    return Evaluation(metric, loss, divergence, 100, 0.05)


@pytest.fixture
def study():
    return optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=2.0))


def test_the_objective_is_the_divergence_after_the_proxy_and_all_that_was_measured_is_kept(study, plan):
    trial = study.ask()
    scorer = Told(evaluation(1.5, metric=0.25), evaluation(0.75, metric=0.625))
    assert score(trial, plan, scorer, None, seed=SEED) == 0.75
    assert scorer.built == [plan.replaced]
    told = study.get_trials()[0]
    assert told.intermediate_values == {0: 1.5}
    assert told.user_attrs == {
        "settled": 0.25,
        "settled_divergence": 1.5,
        "score": 0.625,
        "error": 0.05,
        "divergence": 0.75,
        "examples": 100,
    }
    assert outcome(trial, 0.75) == "scored 0.6250, divergence 0.75"


def test_a_trial_may_be_stopped_before_its_fine_tune(study, plan):
    trial = study.ask()
    assert score(trial, plan, Told(evaluation(3.0, metric=0.25)), None, seed=SEED) == 3.0
    assert trial.user_attrs == {
        "settled": 0.25,
        "settled_divergence": 3.0,
        "score": 0.25,
        "error": 0.05,
        "divergence": 3.0,
        "examples": 100,
        "stopped": True,
    }
    assert outcome(trial, 3.0) == "pruned"


def test_the_objective_of_a_stopped_trial_is_what_others_came_to_from_there(study, plan):
    """Their ratios, in the median: 0.5, 0.75 and 0.8."""
    for settled, tuned in ((2.0, 1.0), (1.0, 0.75), (1.0, 0.8), (0.0, 0.0)):
        trial = study.ask()
        study.tell(trial, score(trial, plan, Told(evaluation(settled), evaluation(tuned)), None, seed=SEED))
    ended = study.get_trials()
    assert score(study.ask(), plan, Told(evaluation(4.0)), None, ended, seed=SEED) == 3.0
    assert foretold(4.0, ended) == 3.0
    assert foretold(4.0, []) == 4.0
    trial = study.ask()
    trial.set_constraint("macs", 0.25)
    assert overstepped(trial, plan.replaced, Told(evaluation(2.0)), ended) == 1.5


def test_a_trial_that_diverges_has_no_objective(study, plan):
    """Also if it did not at first."""
    lost = Evaluation(math.nan, math.nan, math.nan, 0)
    for evaluations in ((lost,), (evaluation(1.0), lost)):
        trial = study.ask()
        assert score(trial, plan, Told(*evaluations), None, seed=SEED) is None
        assert outcome(trial, None) == "pruned"


def test_without_the_dense_outputs_the_loss_is_the_objective(study, plan):
    assert score(study.ask(), plan, Told(evaluation(None), evaluation(None, loss=0.25)), None, seed=SEED) == 0.25


def test_a_plan_that_was_measured_is_not_measured_again(study, plan):
    first = study.ask()
    study.tell(first, score(first, plan, Told(evaluation(1.5), evaluation(1.0)), None, seed=SEED))
    stopped = study.ask()
    study.tell(stopped, score(stopped, plan, Told(evaluation(3.0)), None, seed=SEED))
    lost = study.ask()
    assert score(lost, plan, Told(evaluation(1.5), evaluation(math.nan)), None, seed=SEED) is None
    study.tell(lost, state=TrialState.PRUNED)
    for twin, objective in zip(study.get_trials(), (1.0, 3.0, None), strict=True):
        trial, scorer = study.ask(), Told(evaluation(1.5))
        assert score(trial, plan, scorer, twin, seed=SEED) == objective
        assert scorer.built == []
        assert trial.user_attrs == twin.user_attrs


def test_with_a_second_objective_nothing_is_stopped(plan):
    study = optuna.create_study(directions=["minimize", "minimize"], pruner=optuna.pruners.ThresholdPruner(upper=2.0))
    trial = study.ask()
    assert score(trial, plan, Told(evaluation(9.0), evaluation(2.5)), None, seed=SEED) == 2.5
    assert "stopped" not in trial.user_attrs
    study.tell(trial, (2.5, 0.5))
    assert score(study.ask(), plan, Told(evaluation(9.0)), study.get_trials()[0], seed=SEED) == 2.5


def test_without_data_the_objective_is_the_predicted_error(study, plan):
    trial = study.ask()
    assert score(trial, plan, None, None, seed=SEED) == plan.predicted_error == trial.user_attrs["score"]
    assert outcome(trial, plan.predicted_error) == f"scored {plan.predicted_error:.4f}"


def test_what_is_over_the_budget_is_measured_but_not_fine_tuned(study, plan):
    trial = study.ask()
    trial.set_constraint("macs", 0.25)
    trial.set_constraint("params", -0.5)
    scorer = Told(evaluation(1.5, metric=0.25))
    assert overstepped(trial, plan.replaced, scorer) == 1.5
    assert scorer.built == [plan.replaced]
    assert trial.user_attrs == {"stopped": True, "over": 0.25, "settled": 0.25, "settled_divergence": 1.5}
    assert outcome(trial, 1.5) == "is 25.0% over a budget"
    study.tell(trial, 1.5)
    assert was_stopped(study.get_trials()[0])


def test_what_is_over_the_budget_and_not_finite_has_no_objective(study, plan):
    trial = study.ask()
    trial.set_constraint("macs", 0.25)
    assert overstepped(trial, plan.replaced, Told(evaluation(math.nan))) is None


def test_what_is_over_the_budget_is_not_measured_without_data(study, plan):
    trial = study.ask()
    trial.set_constraint("macs", 0.25)
    assert overstepped(trial, plan.replaced, None) == 0.0
