import math

import optuna
import pytest
from optuna.trial import TrialState

from kronsearch.search.trial import outcome, overstepped, score, tune
from kronsearch.training.evaluate import Evaluation

SEED = 3
WRITTEN = {"score": 0.25, "error": 0.05, "divergence": 1.5, "examples": 100}


class Told:
    """Stands for a scorer: hands out evaluations that were thought up."""

    def __init__(self, settled=None, tuned=None):
        self._settled, self._tuned, self.built = settled, tuned, []

    def build(self, specs):
        self.built.append(specs)
        return "network"

    def settled(self, network):
        assert network == "network"
        assert self._settled is not None
        return self._settled

    def proxy(self, network, seed):
        assert (network, seed) == ("network", SEED)
        assert self._tuned is not None, "a trial is not fine-tuned"
        return self._tuned


def evaluation(divergence, metric=0.25, loss=1.0):
    return Evaluation(metric, loss, divergence, 100, 0.05)


@pytest.fixture
def study():
    return optuna.create_study()


def test_the_objective_is_the_divergence_and_all_that_was_measured_is_kept(study, plan):
    trial, scorer = study.ask(), Told(evaluation(1.5))
    assert score(trial, plan, scorer, None) == 1.5
    assert scorer.built == [plan.replaced]
    assert trial.user_attrs == WRITTEN
    assert outcome(trial, 1.5) == "scored 0.2500, divergence 1.5"


def test_that_of_a_finalist_is_what_it_came_to_after_its_fine_tune(study, plan):
    trial, scorer = study.ask(), Told(tuned=evaluation(1.5))
    assert tune(trial, plan, scorer, seed=SEED) == 1.5
    assert scorer.built == [plan.replaced]
    assert trial.user_attrs == WRITTEN


def test_what_diverges_has_no_objective(study, plan):
    lost = Evaluation(math.nan, math.nan, math.nan, 0)
    trial = study.ask()
    assert score(trial, plan, Told(Evaluation(math.nan, 1.0, 1.0, 5)), None) is None  # a metric of the user's own
    assert score(trial, plan, Told(lost), None) is None
    assert tune(trial, plan, Told(tuned=lost), seed=SEED) is None
    assert trial.user_attrs == {}
    assert outcome(trial, None) == "diverged"
    trial.set_constraint("macs", 0.25)
    assert overstepped(trial, plan.replaced, Told(lost)) is None


def test_without_the_dense_outputs_the_loss_is_the_objective(study, plan):
    assert score(study.ask(), plan, Told(evaluation(None, loss=0.25)), None) == 0.25


def test_a_plan_that_was_measured_is_not_measured_again(study, plan):
    first, lost = study.ask(), study.ask()
    study.tell(first, score(first, plan, Told(evaluation(1.5)), None))
    assert score(lost, plan, Told(evaluation(math.nan)), None) is None
    study.tell(lost, state=TrialState.PRUNED)
    for twin, objective in zip(study.get_trials(), (1.5, None), strict=True):
        trial, scorer = study.ask(), Told()
        assert score(trial, plan, scorer, twin) == objective
        assert scorer.built == []
        assert trial.user_attrs == twin.user_attrs


def test_without_data_the_objective_is_the_predicted_error(study, plan):
    trial = study.ask()
    assert score(trial, plan, None, None) == plan.predicted_error == trial.user_attrs["score"]
    assert outcome(trial, plan.predicted_error) == f"scored {plan.predicted_error:.4f}"


def test_what_is_over_the_budget_is_measured_and_says_so(study, plan):
    trial, scorer = study.ask(), Told(evaluation(1.5))
    trial.set_constraint("macs", 0.25)
    trial.set_constraint("params", -0.5)
    assert overstepped(trial, plan.replaced, scorer) == 1.5
    assert scorer.built == [plan.replaced]
    assert trial.user_attrs == {"over": 0.25, **WRITTEN}
    assert outcome(trial, 1.5) == "is 25.0% over a budget"


def test_what_is_over_the_budget_is_not_measured_without_data(study, plan):
    trial = study.ask()
    trial.set_constraint("macs", 0.25)
    assert overstepped(trial, plan.replaced, None) == 0.0
