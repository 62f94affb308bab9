import pandas as pd
import pytest

import kronsearch as ks
from kronsearch.errors import FileError
from kronsearch.search.fronts import make_plans_folder, plan_name, save_front


@pytest.fixture(scope="module")
def plans(digits_model):
    def plan(flops):
        budget = ks.Budget(flops=flops)
        return ks.search(digits_model, budget=budget, input_shape=(1, 8, 8), allow_slower=True).plan

    return {plan_name(f"flops-{flops}"): plan(flops) for flops in ("50%", "70%")}


def test_names_tell_the_budget_and_stand_for_files():
    assert plan_name("flops-28.42%-params-1 M") == "plans/flops-28.42pct-params-1M.json"
    assert plan_name("trial-3") == "plans/trial-3.json"


def test_a_front_takes_the_place_of_an_earlier_one_and_nothing_else(plans, tmp_path):
    table = pd.DataFrame({"plan": [*plans]})
    save_front(plans, table, tmp_path)
    for name in ("mine.json", "flops-50pct.txt"):
        (tmp_path / "plans" / name).touch()
    for name in ("params-1M", "latency-5ms", "trial-0"):
        (tmp_path / plan_name(name)).touch()
    (kept, plan), _ = plans.items()
    save_front({kept: plan}, table[:1], tmp_path)
    assert pd.read_csv(tmp_path / "front.csv")["plan"].tolist() == [kept]
    assert {path.name for path in (tmp_path / "plans").iterdir()} == {
        "flops-50pct.json",
        "flops-50pct.txt",
        "mine.json",
    }
    assert ks.load_plan(tmp_path / kept) == plan


def test_a_folder_that_can_not_be_made_is_told_before(tmp_path):
    (tmp_path / "plans").touch()
    with pytest.raises(FileError, match=r"plans .*: pass another --out"):
        make_plans_folder(tmp_path)
