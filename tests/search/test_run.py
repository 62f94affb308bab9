import copy
import json
import shutil
import threading

import optuna
import pandas as pd
import pytest
import torch
from sqlalchemy.exc import OperationalError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kronsearch as ks
from kronsearch.errors import BudgetError, CheckpointError, DataError, ModelError, SpaceError, StudyError
from kronsearch.files import alone
from kronsearch.models.apply import load_compressed
from kronsearch.search import score
from kronsearch.search.pace import Pace
from kronsearch.search.space import SearchSpace
from kronsearch.search.study import Study
from kronsearch.search.subject import Subject
from kronsearch.training.task import Classification

SPACE = SearchSpace(deep_fits=3)


# of the study of `found`, to which a search with them comes back
SETTINGS = {
    "budget": ks.Budget(flops="50%", params="60%"),
    "trials": 4,
    "space": SPACE,
    "model_spec": "zoo:digits",
    "allow_slower": True,
}


@pytest.fixture(scope="module")
def found(digits_model, digits_data, tmp_path_factory):
    """A search with four trials, and what it told."""
    out, told = tmp_path_factory.mktemp("run") / "out", []
    result = ks.search(
        digits_model,
        digits_data,
        out=out,
        final_epochs=0.5,
        **SETTINGS,
        watch=told.append,
    )
    return result, told


def test_the_network_is_inside_both_budgets_by_fvcore(found, digits_cost):
    result, _ = found
    cost = ks.profile_model(result.model, input_shape=(1, 8, 8))
    assert (cost.macs, cost.params) == (result.plan.compressed.macs, result.plan.compressed.params)
    assert cost.macs <= digits_cost.macs // 2
    assert cost.params <= digits_cost.params * 6 // 10
    assert result.gap <= 1e-3
    assert result.compressed.n == result.dense.n == 359


def test_three_counts_of_macs_agree(found, digits_cost):
    result, _ = found
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        result.model(torch.zeros(1, 1, 8, 8))
    cost = ks.profile_model(result.model, input_shape=(1, 8, 8))
    fvcore = closed = 0
    for name, layer in result.plan.layers.items():
        dense = digits_cost.layer(name)
        fvcore += sum(part.macs for part in cost.layers if part.name == name or part.name.startswith(f"{name}."))
        closed += (
            dense.kernel_macs
            if layer.spec is None
            else ks.sekron.count_macs(layer.spec, dense.geometry, dense.calls[0])
        )
    assert fvcore == closed == counter.get_total_flops() // 2


def test_files_hold_what_the_result_does(found, digits_model):
    result, _ = found
    assert ks.load_plan(result.out / "plan.json") == result.plan
    again = load_compressed(digits_model, result.out / "compressed.safetensors", result.plan)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), result.model.parameters(), strict=True))
    assert pd.read_csv(result.out / "trials.csv")["trial"].tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in result.out.iterdir()) == [
        ".final.lock",
        "cache",
        "compressed.safetensors",
        "final",
        "plan.json",
        "study.db",
        "trials.csv",
    ]


def test_the_plan_applied_with_data_is_what_the_search_hands_back(found, digits_model, digits_data):
    result, _ = found
    applied = ks.apply_plan(digits_model, result.plan, digits_data)
    untuned = ks.search(
        digits_model,
        digits_data,
        storage=f"sqlite:///{result.out / 'study.db'}",
        final_epochs=0,
        **SETTINGS,
    )
    assert untuned.plan == result.plan
    mine, theirs = applied.state_dict(), untuned.model.state_dict()
    for name, value in mine.items():
        assert torch.allclose(value.double(), theirs[name].double(), rtol=1e-4, atol=1e-5), name


def test_the_final_fine_tune_is_what_finetune_does(found, digits_model, digits_data, tmp_path):
    result, _ = found
    tuned = ks.finetune(digits_model, result.plan, digits_data, epochs=0.5, out=tmp_path)
    mine, theirs = result.model.state_dict(), tuned.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_final_fine_tune_that_is_cut_off_goes_on(found, digits_model, digits_data, tmp_path):
    """What lies there of one with other settings is not gone on with."""
    result, _ = found
    steps = []

    def again(out, stop=None):
        def watch(step):
            if step.phase == "final":
                steps.append(step.done)
            if step.phase == "final" and stop is not None and step.done > stop:
                raise InterruptedError("by the test")

        return ks.search(digits_model, digits_data, out=out, final_epochs=3, **SETTINGS, watch=watch)

    for name in ("whole", "cut"):
        shutil.copytree(result.out, tmp_path / name)
    whole = again(tmp_path / "whole")
    assert steps[0] == 0
    an_epoch, last = steps[-1] // 3, steps[-1]
    with pytest.raises(InterruptedError, match="by the test"):
        again(tmp_path / "cut", stop=an_epoch)
    steps.clear()
    cut = again(tmp_path / "cut")
    assert (steps[0], steps[-1]) == (an_epoch, last)
    mine, theirs = cut.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    steps.clear()
    again(tmp_path / "cut")
    assert steps == []


def test_of_workers_that_share_a_folder_one_fine_tunes_the_winner(found, digits_model, digits_data, tmp_path):
    result, _ = found
    shutil.copytree(result.out, tmp_path / "out")
    (tmp_path / "out" / "compressed.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "final")
    waiting, told = threading.Event(), []

    def watch(step):
        told.append((step.phase, step.message))
        if step.message == "another worker is at it":
            waiting.set()

    def other():
        ks.search(digits_model, digits_data, out=tmp_path / "out", final_epochs=0.5, **SETTINGS, watch=watch)

    worker = threading.Thread(target=other)
    with alone(tmp_path / "out" / ".final.lock", lambda: None):
        worker.start()
        assert waiting.wait(timeout=120)
        for name in ("compressed.safetensors", "final"):  # what the first worker came to meanwhile
            copy = shutil.copytree if (result.out / name).is_dir() else shutil.copy
            copy(result.out / name, tmp_path / "out" / name)
    worker.join()
    assert [message for phase, message in told if phase == "final"] == ["another worker is at it"]


def test_what_is_minimised_is_the_divergence_and_the_score_is_kept_beside_it(found, digits_data):
    result, _ = found
    study = optuna.load_study(study_name="kronsearch", storage=f"sqlite:///{result.out / 'study.db'}")
    assert study.direction is optuna.study.StudyDirection.MINIMIZE
    trials = study.get_trials()
    assert [trial.value for trial in trials] == result.trials["divergence"].tolist()
    winner = trials[result.plan.provenance.trial]
    assert winner.user_attrs["score"] > 0.9
    assert winner.user_attrs["examples"] == digits_data.size("train")


def test_a_network_too_large_for_all_images_is_measured_on_fewer(digits_model, digits_data, digits_cost, monkeypatch):
    monkeypatch.setattr(score, "_SETTLED_IMAGES", (100, 10_000))
    monkeypatch.setattr(score, "_SETTLED_WORK", 500 * digits_cost.macs)
    tried = []
    monkeypatch.setattr(
        score.Scorer, "proxy", lambda scorer, model, seed: tried.append(scorer) or scorer.settled(model)
    )
    ks.search(digits_model, digits_data, budget=ks.Budget(flops="50%"), trials=1, final_epochs=0, allow_slower=True)
    (scorer,) = tried
    assert scorer.settled(digits_model).n == 500


def test_the_summary_and_the_times_are_of_the_trials(found):
    result, _ = found
    summary = result.summary
    assert (summary.trials, summary.winner) == (4, result.plan.provenance.trial)
    assert summary.best == result.plan.score.value
    assert summary.plain_divergence == result.trials["tuned_divergence"][0]
    assert summary.finalists == result.trials["digest"].nunique() > 1
    tuned = {"trials", "finalists", "final"}
    other = {"profile", "calibrate", "tables", "sensitivity", "context", "apply", "test"}
    assert set(result.seconds) == other | tuned
    assert 0 < result.tuning < sum(result.seconds[phase] for phase in tuned)


def test_the_winner_is_chosen_among_finalists_that_a_fine_tune_brings_nearer(found, digits_data):
    result, _ = found
    trials, winner = result.trials, result.plan.provenance.trial
    assert (trials["tuned_divergence"] < trials["divergence"]).all()
    assert trials["trial"][winner] == winner == trials["tuned_divergence"].idxmin()
    assert result.plan.score.value == trials["tuned_score"][winner]
    assert result.plan.score.examples == digits_data.size("val")
    study = optuna.load_study(study_name="kronsearch finals", storage=f"sqlite:///{result.out / 'study.db'}")
    best = trials.sort_values("divergence")["digest"].drop_duplicates().tolist()
    plain = trials["digest"][0]
    assert [trial.user_attrs["slot"] for trial in study.trials] == [plain, *[each for each in best if each != plain]]
    assert pd.read_csv(result.out / "trials.csv")["tuned_score"].tolist() == trials["tuned_score"].tolist()


def test_every_phase_is_told_in_order(found):
    _, told = found
    phases = list(dict.fromkeys(step.phase for step in told))
    assert phases == [
        *("profile", "calibrate", "tables", "sensitivity", "context"),
        *("trials", "finalists", "apply", "final", "test"),
    ]
    assert [step.done for step in told if step.phase == "finalists"] == list(range(found[0].summary.finalists + 1))
    trials = [step for step in told if step.phase == "trials"]
    assert [step.done for step in trials] == [0, 1, 2, 3, 4]
    assert trials[-1].best == min(step.best for step in trials[1:])


def test_the_same_seed_gives_the_same_plan(found, digits_model, digits_data):
    result, _ = found
    again = ks.search(
        digits_model,
        digits_data,
        budget=ks.Budget(flops="50%", params="60%"),
        trials=4,
        space=SPACE,
        final_epochs=0,
        allow_slower=True,
        model_spec="zoo:digits",
    )
    assert again.plan == result.plan
    assert again.out is None


def test_every_layer_left_dense_has_its_reason(digits_model):
    space = SearchSpace(deep_fits=3, keep_dense=("conv1",))
    budget = ks.Budget(flops="70%")
    result = ks.search(digits_model, budget=budget, space=space, input_shape=(1, 8, 8), allow_slower=True)
    assert "keeps 'conv1' dense" in result.plan.layers["conv1"].dense
    assert result.dense is None
    assert result.plan.score is None
    assert result.summary is None
    assert len(result.trials) == 1


def test_with_a_params_budget_alone_macs_do_not_grow(digits_model, digits_cost):
    budget = ks.Budget(params="50%")
    result = ks.search(digits_model, budget=budget, space=SPACE, input_shape=(1, 8, 8), allow_slower=True)
    assert result.plan.compressed.params <= digits_cost.params // 2
    assert result.plan.compressed.macs <= digits_cost.macs


def test_a_frozen_network_is_fine_tuned_all_the_same(digits_data):
    model = ks.load_model("zoo:digits").requires_grad_(False)
    budget, space = ks.Budget(flops="60%"), SearchSpace(structures=("spatial",))
    result = ks.search(model, digits_data, budget=budget, trials=1, space=space, allow_slower=True, final_epochs=0.5)
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_can_not_be_is_refused_before_there_is_a_file(digits_model, digits_data, digits_cost, tmp_path):
    out, half = tmp_path / "out", ks.Budget(flops="50%")
    small = ks.load_model("zoo:digits")
    small.get_parameter("conv1.weight").data[0, 0, 0, 0] = float("nan")
    wrong = ks.load_data("digits", seed=0)
    wrong.task = Classification(classes=7)
    complex_ = ks.load_model("zoo:digits")
    complex_.register_buffer("rotation", torch.ones(1, dtype=torch.complex64))
    untested = ks.load_data("digits", seed=0)
    untested.size = lambda split: 0 if split == "test" else digits_data.size(split)
    for arguments, error, message in (
        (
            {"model": digits_model, "budget": ks.Budget(flops="1%"), "data": digits_data},
            BudgetError,
            "can't be reached",
        ),
        ({"model": digits_model, "budget": ks.Budget(flops="1G"), "data": digits_data}, BudgetError, "nothing needs"),
        ({"model": small, "budget": ks.Budget(flops="50%"), "data": digits_data}, ModelError, "not finite"),
        ({"model": digits_model, "budget": ks.Budget(flops="50%"), "data": wrong}, DataError, "classes"),
        ({"model": digits_model, "budget": half, "data": untested}, DataError, "no example in the test split"),
        (
            {"model": complex_, "budget": half, "data": digits_data},
            CheckpointError,
            r"can't write rotation .torch.complex64. to .*out/compressed.safetensors",
        ),
        ({"model": digits_model, "budget": ks.Budget(flops="50%")}, ModelError, r"pass one \(--input-shape\)"),
        (
            {"model": digits_model, "budget": half, "data": digits_data, "space": SearchSpace(keep_dense=("nowhere",))},
            SpaceError,
            "which no layer of the model is called",
        ),
        (
            {"model": nn.Linear(64, 64), "budget": half, "input_shape": (64,)},
            BudgetError,
            "can't be reached",
        ),
    ):
        with pytest.raises(error, match=message):
            ks.search(**arguments, out=out)
        assert not out.exists()


@pytest.fixture
def on_a_hand_made_machine(stopwatch, hand_timer, monkeypatch, digits_model):
    """Let searches run on a machine where layers take as much of the time as of the parameters."""
    dense = {tuple(weight.shape): weight.numel() for weight in digits_model.parameters()}
    timer = hand_timer(lambda spec: spec.params / dense[spec.kernel_shape])
    monkeypatch.setattr(Subject, "stopwatch", lambda _, setting: stopwatch(timer, setting))
    return timer


def test_every_plan_of_a_budget_of_latency_was_measured_to_keep_it(
    digits_model, digits_data, tmp_path, on_a_hand_made_machine
):
    timer = on_a_hand_made_machine
    timer.noise = 1.1
    settings = {
        "budget": ks.Budget(latency="60%", flops="90%"),
        "space": SearchSpace(structures=("spatial", "deep"), deep_fits=3),
        "out": tmp_path / "out",
        "final_epochs": 0,
        "latency_batch": 4,
    }
    first = ks.search(digits_model, digits_data, **settings, trials=2)
    assert (first.trials["latency_ratio"] <= 0.6).all()
    assert first.plan.latency.ratio <= 0.6
    assert first.plan.latency.batch == 4
    assert first.plan.budget.latency == "60%"
    assert first.plan.compressed.macs <= first.plan.budget.max_macs
    before = (tmp_path / "out" / "compressed.safetensors").stat().st_mtime_ns
    compared = len(timer.compared)
    again = ks.search(digits_model, digits_data, **settings, trials=2)
    assert again.plan == first.plan
    assert len(timer.compared) == compared  # what was measured is on the shelf
    assert (tmp_path / "out" / "compressed.safetensors").stat().st_mtime_ns == before
    with pytest.raises(StudyError, match="latency was batch 4, threads 1, is batch 8, threads 1"):
        ks.search(digits_model, digits_data, **settings | {"latency_batch": 8}, trials=2)


def test_without_such_a_budget_the_winner_is_measured(digits_model, on_a_hand_made_machine):
    budget, space = ks.Budget(flops="50%"), SearchSpace(structures=("spatial",))
    result = ks.search(digits_model, budget=budget, space=space, input_shape=(1, 8, 8))
    assert on_a_hand_made_machine.compared[-1] == result.plan.replaced
    assert 0 < result.plan.latency.ratio <= 1.3 / 2


def test_a_trial_that_misses_the_budget_of_latency_is_pruned(
    digits_model, digits_data, on_a_hand_made_machine, monkeypatch
):
    kept = Pace.allocate
    calls = []

    def misses_first(*args):
        calls.append(args)
        return None if len(calls) == 1 else kept(*args)

    monkeypatch.setattr(Pace, "allocate", misses_first)
    budget, space = ks.Budget(latency="80%"), SearchSpace(structures=("spatial",))
    result = ks.search(digits_model, digits_data, budget=budget, space=space, trials=2, final_epochs=0)
    assert list(result.trials["state"]) == ["pruned", "complete"]
    assert result.plan.provenance.trial == 1


def test_a_study_of_another_model_or_task_is_refused(found, digits_model, digits_data):
    result, _ = found
    other = ks.load_model("zoo:digits")
    with torch.no_grad():
        other.get_parameter("conv1.weight").mul_(1.01)
    with pytest.raises(StudyError, match="weights was"):
        ks.search(other, digits_data, budget=ks.Budget(flops="50%", params="60%"), out=result.out, space=SPACE)
    with pytest.raises(StudyError, match=r"model args was .*, is \{'act': 'tanh'\}"):
        ks.search(digits_model, digits_data, out=result.out, **SETTINGS, model_args={"act": "tanh"})
    slanted = copy.deepcopy(digits_model)
    slanted.bn1.eps = 0.1
    with pytest.raises(StudyError, match="structure was"):
        ks.search(slanted, digits_data, out=result.out, **SETTINGS)
    asked = copy.copy(digits_data)
    asked.task = Classification()
    asked.task.metric_name = "top-1"
    with pytest.raises(StudyError, match="task was Classification classification, accuracy, higher is better, is"):
        ks.search(digits_model, asked, out=result.out, **SETTINGS)


def test_the_plan_is_json_that_says_where_it_comes_from(found):
    result, _ = found
    content = json.loads((result.out / "plan.json").read_text())
    assert content["provenance"]["trial"] == result.plan.provenance.trial
    assert content["score"]["metric"] == "accuracy"
    assert content["model"]["spec"] == "zoo:digits"
    assert set(content["provenance"]["versions"]) >= {"kronsearch", "torch", "optuna", "fvcore"}


def test_a_direct_search_tells_what_is_over_the_budget_and_hands_back_what_is_not(
    digits_model, digits_data, digits_cost, tmp_path
):
    settings = {
        "budget": ks.Budget(flops="25%"),
        "decoder": "direct",
        "sampler": "random",
        "sensitivity": "plain",
        "space": SearchSpace(structures=("spatial",)),
        "allow_slower": True,
        "final_epochs": 0,
        "out": tmp_path / "out",
    }
    result = ks.search(digits_model, digits_data, trials=7, **settings)
    table = result.trials
    over = table["over"] > 0
    assert over.any()
    assert (table["state"] == over.map({True: "over budget", False: "complete"})).all()
    assert table["digest"][over].isna().all()
    assert table["tuned_divergence"][over].isna().all()
    assert table["divergence"].notna().all()
    assert not over[:3].any()
    assert (table["macs"][~over] <= digits_cost.macs // 4).all()
    assert result.plan.compressed.macs <= digits_cost.macs // 4
    assert all(0 <= value <= 1 for value in table.filter(like="place/").to_numpy().ravel())
    for setting, name, was in (("decoder", "allocate", "direct"), ("sampler", "tpe", "random")):
        with pytest.raises(StudyError, match=f"{setting} was {was}, is {name}"):
            ks.search(digits_model, digits_data, trials=7, **settings | {setting: name})


@pytest.mark.parametrize("setting", ["decoder", "sampler", "sensitivity"])
def test_a_name_that_there_is_not_is_refused_before_anything_is_done(digits_model, tmp_path, setting):
    with pytest.raises(StudyError, match=f"no {setting} 'best': choose one of ") as caught:
        ks.search(digits_model, budget=ks.Budget(flops="50%"), out=tmp_path / "out", **{setting: "best"})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"trials": 1.5}, "trials 1.5 is asked for: ask for a whole number above zero"),
        ({"latency_batch": 0}, "latency batch 0 is asked for"),
        ({"latency_threads": True}, "latency threads True is asked for"),
        ({"timeout": float("nan")}, "a timeout of nan seconds is asked for: ask for a number of 0 or more"),
        ({"timeout": "30m"}, "a timeout of '30m' seconds is asked for"),
        ({"seed": 1.5}, r"a seed of 1.5 is asked for: ask for a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": -1}, "a seed of -1 is asked for"),
        ({"model_args": {"act": torch.relu}}, r"can't stand in a plan, which is JSON \(Object of type builtin"),
    ],
)
def test_what_can_not_be_counted_or_written_is_refused_before_anything_is_done(digits_model, tmp_path, asked, told):
    with pytest.raises(StudyError, match=told) as caught:
        ks.search(digits_model, budget=ks.Budget(flops="50%"), input_shape=(1, 8, 8), out=tmp_path / "out", **asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_device_that_there_is_not_is_refused_before_anything_is_done(digits_model, tmp_path):
    with pytest.raises(ModelError, match="there is no device 'nothing': pass cpu, or cuda where there is one"):
        ks.search(
            *(digits_model, None),
            budget=ks.Budget(flops="50%"),
            input_shape=(1, 8, 8),
            out=tmp_path / "out",
            device="nothing",
        )
    assert not (tmp_path / "out").exists()


def test_when_the_time_is_over_it_is_told_what_is_left(digits_model, digits_data):
    result = ks.search(digits_model, digits_data, **SETTINGS | {"trials": 3}, timeout=0, final_epochs=0)
    assert (len(result.trials), result.left) == (1, 2)


@pytest.mark.parametrize(("step", "place"), [("left", {"storage": "sqlite:///"}), ("table", {"out": "."})])
def test_a_storage_that_fails_at_any_step_is_told_in_one_line(digits_model, tmp_path, monkeypatch, step, place):
    def fail(*_):
        raise OperationalError("select", {}, OSError("the server is gone"))

    monkeypatch.setattr(Study, step, fail)
    monkeypatch.chdir(tmp_path)
    told = r"the storage sqlite:///(study.db)? failed \(.*the server is gone\): mend it, and run"
    with pytest.raises(StudyError, match=told) as caught:
        ks.search(
            digits_model,
            budget=ks.Budget(flops="50%"),
            space=SPACE,
            input_shape=(1, 8, 8),
            allow_slower=True,
            **place,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a?b", "50%"])
def test_a_folder_that_means_something_else_in_a_url_is_refused(digits_model, tmp_path, name):
    with pytest.raises(StudyError, match=r"can't be kept in .* for its \? or %: pass another --out"):
        ks.search(digits_model, budget=ks.Budget(flops="50%"), space=SPACE, input_shape=(1, 8, 8), out=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_single_trial_has_the_parameters_of_those_to_come(digits_model, digits_data):
    result = ks.search(digits_model, digits_data, **SETTINGS | {"trials": 1}, final_epochs=0)
    assert list(result.trials["context"]) == [0.0]


def test_without_data_a_direct_search_hands_back_the_plain_plan(digits_model):
    settings = {
        "budget": ks.Budget(flops="50%"),
        "space": SPACE,
        "input_shape": (1, 8, 8),
        "allow_slower": True,
        "seed": 2**40,
    }
    plain, direct = (ks.search(digits_model, **settings, decoder=name) for name in ("allocate", "direct"))
    assert len(direct.trials) == 1
    assert direct.plan.replaced == plain.plan.replaced
