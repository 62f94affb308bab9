import pandas as pd
import pytest
from optuna.trial import TrialState, create_trial

import kronsearch as ks
from kronsearch.errors import BudgetError, StudyError
from kronsearch.search.finals import Finalist
from kronsearch.search.frontier import _unbeaten
from kronsearch.search.space import SearchSpace

SETTINGS = {"flops": "30%:80%", "params": "90%", "space": SearchSpace(deep_fits=3), "allow_slower": True}


@pytest.fixture(scope="module")
def found(digits_model, digits_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("front")
    return ks.search_front(digits_model, digits_data, trials=6, out=out, **SETTINGS)


def test_no_point_is_beaten_before_the_fine_tune_or_after_it(found):
    trials = found.trials
    assert len(trials) == 6
    assert found.left == 0
    finalists = set()
    for _, trial in trials.iterrows():
        better = trials[(trials["divergence"] <= trial["divergence"]) & (trials["macs"] <= trial["macs"])]
        if (better[["divergence", "macs"]] == trial[["divergence", "macs"]]).all(axis=None):
            finalists.add(trial["trial"])
    assert set(trials.loc[trials["tuned_divergence"].notna(), "trial"]) == finalists
    assert set(found.table["trial"]) <= finalists
    assert (found.table["macs"].diff()[1:] > 0).all()
    assert (found.table["divergence"].diff()[1:] < 0).all()
    tuned = trials.set_index("trial")["tuned_divergence"]
    assert found.table["divergence"].tolist() == tuned[found.table["trial"]].tolist()


def test_without_data_there_is_no_front(digits_model):
    with pytest.raises(StudyError, match="no data to score plans on: pass some, or take `sweep`"):
        ks.search_front(digits_model, None, flops="30%:80%")


def test_what_costs_no_less_and_diverges_no_less_is_not_on_the_front():
    def finalist(macs, divergence):
        trial, measured = (
            create_trial(state=TrialState.COMPLETE, value=divergence, user_attrs={"macs": macs}) for _ in range(2)
        )
        return Finalist(trial, measured)

    given = [finalist(*told) for told in ((3, 0.5), (1, 0.9), (2, 0.9), (3, 0.4), (4, 0.6), (5, 0.3))]
    front = _unbeaten(given, "macs")
    assert [(each.trial.user_attrs["macs"], each.measured.value) for each in front] == [(1, 0.9), (3, 0.4), (5, 0.3)]


def test_plans_keep_the_budget_of_their_trial_and_the_fixed_one(found, digits_cost):
    parts = [plan.budget.max_macs / digits_cost.macs for plan in (point.plan for point in found.points)]
    assert all(0.299 < part < 0.801 for part in parts)
    for point in found.points:
        assert point.plan.compressed.macs <= point.plan.budget.max_macs
        assert point.plan.compressed.params <= point.plan.budget.max_params == digits_cost.params * 9 // 10
        assert point.plan.score.value == point.measured["score"] > 0.8


def test_it_begins_with_plain_allocations_from_end_to_end(found):
    first = found.trials.iloc[:5].sort_values("budget")
    assert first["budget"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (first["trust"] == 0.5).all()
    assert first["macs"].is_monotonic_increasing
    assert found.trials["budget"][5] not in first["budget"].tolist()


def test_files_hold_what_the_result_does(found):
    pd.testing.assert_frame_equal(pd.read_csv(found.out / "front.csv", dtype=found.table.dtypes.to_dict()), found.table)
    for point in found.points:
        assert ks.load_plan(found.out / point.name) == point.plan
    assert pd.read_csv(found.out / "trials.csv")["trial"].tolist() == list(range(6))


def test_the_same_call_resumes_and_others_are_refused(found, digits_model, digits_data):
    again = ks.search_front(digits_model, digits_data, trials=6, out=found.out, **SETTINGS)
    assert again.table.equals(found.table)
    assert again.tuning == 0
    with pytest.raises(StudyError, match=r"budget.*30%:80%.*30%:70%"):
        ks.search_front(digits_model, digits_data, out=found.out, **SETTINGS | {"flops": "30%:70%"})
    with pytest.raises(StudyError, match="objective"):
        ks.search(digits_model, digits_data, budget=ks.Budget(flops="30%"), out=found.out, allow_slower=True)


def test_what_can_not_be_is_refused_before_there_is_a_file(digits_model, digits_data, tmp_path):
    for changed, error, message in (
        ({"flops": "30%"}, BudgetError, "none of the budgets of flops and params has two ends"),
        ({"params": "30%:50%"}, BudgetError, "each of the budgets"),
        ({"flops": "80%:30%"}, BudgetError, "go nowhere"),
        ({"flops": "30%:100%", "params": None}, BudgetError, "kept by the dense model already"),
        ({"flops": "1%:50%"}, BudgetError, "can't be reached"),
        ({"sampler": "cmaes"}, StudyError, "knows one objective only: choose gp, tpe or random"),
        ({"sampler": "GP"}, StudyError, "there is no sampler 'GP'"),
        ({"trials": 0}, StudyError, "trials 0 is asked for: ask for a whole number above zero"),
    ):
        with pytest.raises(error, match=message):
            ks.search_front(digits_model, digits_data, out=tmp_path / "out", **SETTINGS | changed)
        assert not (tmp_path / "out").exists()
