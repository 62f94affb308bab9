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
    mine = ("mine.json", "flops-70pct-best.json", "trial-0.json")
    for name in mine:
        (tmp_path / "plans" / name).touch()
    (kept, plan), (_, other) = plans.items()
    save_front({kept: plan}, table[:1], tmp_path)
    assert pd.read_csv(tmp_path / "front.csv")["plan"].tolist() == [kept]
    assert {path.name for path in (tmp_path / "plans").iterdir()} == {"flops-50pct.json", *mine}
    assert ks.load_plan(tmp_path / kept) == plan
    save_front({"plans/a.json": other}, table[:1], tmp_path)  # a worker beside it has removed nothing, or all
    assert not (tmp_path / kept).exists()


@pytest.mark.parametrize(
    "table", ["", "plan\n../mine.json\nplans/../../mine.json\nplans\n", "name\nplans/mine.json\n", "\0"]
)
def test_a_table_that_is_not_ours_removes_nothing(plans, tmp_path, table):
    (tmp_path / "out" / "plans").mkdir(parents=True)
    for path in (tmp_path / "mine.json", tmp_path / "out" / "plans" / "mine.json"):
        path.touch()
    (tmp_path / "out" / "front.csv").write_text(table)
    save_front(plans, pd.DataFrame({"plan": [*plans]}), tmp_path / "out")
    assert (tmp_path / "mine.json").exists()
    assert (tmp_path / "out" / "plans" / "mine.json").exists()


def test_what_can_not_be_removed_is_told(plans, tmp_path):
    (tmp_path / "plans" / "a.json").mkdir(parents=True)
    (tmp_path / "front.csv").write_text("plan\nplans/a.json\n")
    with pytest.raises(FileError, match=r"can't remove .*a.json, of an earlier front"):
        save_front(plans, pd.DataFrame({"plan": [*plans]}), tmp_path)


def test_a_folder_that_can_not_be_made_is_told_before(tmp_path):
    (tmp_path / "plans").touch()
    with pytest.raises(FileError, match=r"plans .*: pass another --out"):
        make_plans_folder(tmp_path)
