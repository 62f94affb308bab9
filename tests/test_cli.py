"""The command line by itself: options reach the library's one call, errors become a line and an exit code."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kronsearch import commands
from kronsearch.budget import Budget
from kronsearch.cli import app
from kronsearch.config import Settings
from kronsearch.errors import BudgetError
from kronsearch.models.bench import Timing
from kronsearch.plan import save_plan
from kronsearch.progress import Progress
from kronsearch.search.summary import Summary
from kronsearch.training.evaluate import Evaluation

ROOT = Path(__file__).parent.parent


def invoke(*args: str, code: int = 0):
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch, plan):
    """Put doubles in the place of the library's calls that `run` makes, and return what they were called with."""
    calls = SimpleNamespace(model=nn.Identity(), data=None, search=None, error=None)

    def load_model(spec, *, weights=None, args=None):
        calls.load_model = (spec, weights, args)
        return calls.model

    def load_data(spec, *, seed=0, val_fraction=None):
        calls.load_data, calls.val_fraction = (spec, seed), val_fraction
        calls.data = SimpleNamespace(task=SimpleNamespace(metric_name="accuracy"), input_shape=(1, 8, 8))
        return calls.data

    def search(*args, **options):
        calls.search = (args, options)
        if calls.error is not None:
            raise calls.error
        result = Evaluation(0.5, 1.0, None, 10) if calls.data is not None else None
        return SimpleNamespace(
            plan=plan,
            dense=result,
            compressed=result,
            out=Path(options["out"]),
            summary=Summary(2, 0, 2, 1, 0.25, 0.5, None, None, ()),
            seconds={"trials": 90.0},
            tuning=45.0,
            trials=[0],
            left=2,
        )

    monkeypatch.setattr("kronsearch.models.loading.load_model", load_model)
    monkeypatch.setattr("kronsearch.models.loading.default_input_shape", lambda spec, model: (3, 224, 224))
    monkeypatch.setattr("kronsearch.training.sources.load_data", load_data)
    double = ModuleType("kronsearch.search.run")
    double.search = search  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kronsearch.search.run", double)
    monkeypatch.setattr("kronsearch.models.apply.measured", lambda plan, model, small: plan)
    return calls


RUN = ("run", "--model", "zoo:digits", "--budget-flops", "50%")


def test_options_reach_the_search(calls):
    result = invoke(
        *("run", "--model", "m:f", "--model-args", '{"a": 1}', "--weights", "w.pt", "--data", "digits"),
        *("--input-shape", "1,8,8", "--budget-flops", "1G", "--budget-params", "20%", "--space", "spatial"),
        *("--budget-latency", "70%", "--latency-batch", "8", "--latency-threads", "1", "--allow-slower"),
        *("--trials", "3", "--timeout", "2m", "--storage", "sqlite:///x.db", "--study", "s", "--out", "there"),
        *("--cache", "kept", "--seed", "5", "--final-epochs", "0.5", "--device", "cpu", "--quiet"),
        *("--decoder", "direct", "--sampler", "random", "--sensitivity", "fisher"),
    )
    assert calls.load_model == ("m:f", "w.pt", {"a": 1})
    assert calls.load_data == ("digits", 5)
    args, options = calls.search
    watch = options.pop("watch")
    assert args == (calls.model, calls.data)
    assert watch.__name__ == "ignore"
    assert options == {
        "budget": Budget(flops="1G", params="20%", latency="70%"),
        "latency_batch": 8,
        "latency_threads": 1,
        "allow_slower": True,
        "decoder": "direct",
        "sampler": "random",
        "sensitivity": "fisher",
        "trials": 3,
        "timeout": 2 * 60.0,
        "space": "spatial",
        "storage": "sqlite:///x.db",
        "study": "s",
        "out": "there",
        "cache": "kept",
        "input_shape": (1, 8, 8),
        "device": "cpu",
        "seed": 5,
        "final_epochs": 0.5,
        "model_spec": "m:f",
        "model_args": {"a": 1},
    }
    assert "test accuracy" in result.stdout
    assert "2 of 3 trials were not begun: the time was over; the same line with more of it goes on\n" in result.stdout
    assert "written to there:" in result.stdout
    assert result.stderr == ""


@pytest.fixture
def fronts(plan, monkeypatch):
    """Stand for the search for a front, and collect what it is called with."""
    called = []
    double = ModuleType("kronsearch.search.frontier")

    def search_front(*args, **options):
        called.append((args, options))
        point = SimpleNamespace(plan=plan, measured={"score": 0.5, "error": 0.25}, name="plans/trial-0.json")
        return SimpleNamespace(
            points=(point,), trials=[1, 2, 3], left=0, out=Path("there"), seconds={"trials": 9.0}, tuning=3.0
        )

    double.search_front = search_front  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kronsearch.search.frontier", double)
    return called


FRONT = ("run", "--objective", "pareto", "--model", "m:f", "--data", "digits", "--budget-flops", "25%:90%")


def test_options_reach_the_search_for_a_front(calls, fronts):
    result = invoke(
        *(*FRONT, "--budget-params", "40%", "--sampler", "tpe", "--sensitivity", "fisher", "--trials", "3", "--quiet"),
        *("--timeout", "2m", "--space", "spatial", "--storage", "sqlite:///x.db", "--study", "s", "--out", "there"),
        *("--cache", "kept", "--seed", "5", "--latency-batch", "2", "--allow-slower"),
    )
    [(args, options)] = fronts
    assert options.pop("watch").__name__ == "ignore"
    assert args == (calls.model, calls.data)
    assert options == {
        "flops": "25%:90%",
        "params": "40%",
        "sampler": "tpe",
        "sensitivity": "fisher",
        "trials": 3,
        "timeout": 2 * 60.0,
        "space": "spatial",
        "storage": "sqlite:///x.db",
        "study": "s",
        "out": "there",
        "cache": "kept",
        "device": "cpu",
        "seed": 5,
        "latency_batch": 2,
        "latency_threads": 1,
        "allow_slower": True,
        "model_spec": "m:f",
        "model_args": {},
    }
    assert "0.5000 ± 0.2500" in result.stdout
    assert "1 of 3 trials between flops 25%:90%, params 40% are on the front" in " ".join(result.stdout.split())
    assert "written to there: front.csv, plans/, trials.csv" in result.stdout


@pytest.mark.parametrize(
    ("added", "told"),
    [
        (("--budget-latency", "5ms"), "--budget-latency does not go with --objective pareto"),
        (("--decoder", "direct"), "--decoder direct does not go with --objective pareto"),
        (("--input-shape", "1,8,8"), "--input-shape does not go with --objective pareto"),
        (("--final-epochs", "2"), "--final-epochs does not go with --objective pareto: leave it out or pass "),
        (("--budget-flops", "50%"), "none of the budgets of flops and params has two ends"),
    ],
)
def test_what_a_search_for_a_front_has_not_is_refused(calls, fronts, added, told):
    assert told in invoke(*FRONT, *added, code=2).stderr
    assert fronts == []


def test_a_search_for_a_front_needs_data(calls, fronts):
    line = ("run", "--objective", "pareto", "--model", "m:f", "--budget-flops", "25%:90%")
    assert "no --data given to score plans on" in invoke(*line, code=2).stderr
    assert fronts == []


def test_options_reach_the_sweep(calls, plan, monkeypatch):
    swept = []
    double = ModuleType("kronsearch.search.sweep")
    double.sweep = lambda *args, **options: (  # type: ignore[attr-defined]
        swept.append((args, options)),
        SimpleNamespace(
            points=(SimpleNamespace(plan=plan, weighed_error=0.5, name="plans/a.json"),), out=Path("there")
        ),
    )[1]
    monkeypatch.setitem(sys.modules, "kronsearch.search.sweep", double)
    Path("kronsearch.yaml").write_text("trials: 3\nbudget-params: 40%\n")
    result = invoke(
        *("sweep", "--model", "m:f", "--model-args", '{"a": 1}', "--weights", "w.pt", "--data", "digits"),
        *("--budget-flops", "25%:90%:20", "--space", "spatial", "--out", "there", "--cache", "kept", "--seed", "5"),
        *("--input-shape", "1,8,8", "--device", "cpu", "--quiet", "--budget-latency", "5ms", "--latency-batch", "2"),
        *("--sensitivity", "absolute"),
    )
    assert calls.load_model == ("m:f", "w.pt", {"a": 1})
    [(args, options)] = swept
    assert options.pop("watch").__name__ == "ignore"
    assert args == (calls.model, calls.data)
    assert options == {
        "flops": "25%:90%:20",
        "params": "40%",
        "latency": "5ms",
        "latency_batch": 2,
        "latency_threads": 1,
        "allow_slower": False,
        "sensitivity": "absolute",
        "space": "spatial",
        "out": "there",
        "cache": "kept",
        "input_shape": (1, 8, 8),
        "device": "cpu",
        "seed": 5,
        "model_spec": "m:f",
        "model_args": {"a": 1},
    }
    assert "plans/a.json" in result.stdout
    assert "written to there: front.csv, plans/" in result.stdout
    assert result.stderr == ""


@pytest.fixture
def timed(calls, plan, monkeypatch):
    """Put doubles in the place of what `bench` calls, and return what it was called with."""
    calls.timed = []

    def bench(*networks, **options):
        calls.timed.append((networks, options))
        return [Timing("", 1, 1, 3.0, 2.0, 1.5, 1.25, 1.75, 9, "contiguous", "channels_last")]

    monkeypatch.setattr("kronsearch.models.bench.bench", bench)
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", lambda model, plan, **options: "applied")
    monkeypatch.setattr("kronsearch.models.apply.stored_plan", lambda file: plan)
    monkeypatch.setattr("kronsearch.models.apply.load_compressed", lambda model, file, plan: f"loaded from {file}")
    return calls


def test_options_reach_the_timing(timed, plan):
    save_plan(plan, "plan.json")
    Path("kronsearch.yaml").write_text("threads: 1\nbatch: [1, 8]\n")
    result = invoke(
        *("bench", "plan.json", "--model", "m:f", "--weights", "w.pt", "--model-args", '{"a": 1}', "--batch", "2, 4"),
        *("--seconds", "0.5", "--csv", "t.csv", "--device", "cpu", "--quiet"),
    )
    assert timed.load_model == ("m:f", "w.pt", {"a": 1})
    [(networks, options)] = timed.timed
    assert networks == (timed.model, "applied")
    assert options == {
        "input_shape": plan.input_shape,
        "batches": (2, 4),
        "threads": (1,),
        "seconds": 0.5,
        "device": "cpu",
    }
    assert "1.50×" in result.stdout
    assert "written to t.csv" in result.stdout
    assert Path("t.csv").read_text().count("\n") == 2
    assert result.stderr == ""


def test_a_compressed_file_is_timed_as_the_plan_or_as_the_weights(timed):
    invoke("bench", "small.safetensors", "--model", "m:f", "--weights", "w.pt")
    assert timed.load_model == ("m:f", "w.pt", {})
    invoke("bench", "--model", "m:f", "--weights", "small.safetensors")
    assert timed.load_model == ("m:f", None, {})
    assert [networks for networks, _ in timed.timed] == [(timed.model, "loaded from small.safetensors")] * 2
    assert timed.timed[0][1]["threads"] is None


def test_what_is_not_given_has_its_default(calls):
    invoke(*RUN)
    args, options = calls.search
    assert args == (calls.model, None)
    for name in ("trials", "timeout", "space", "storage", "study", "out", "device", "seed", "final_epochs"):
        assert options[name] == getattr(Settings(), name)
    assert options["input_shape"] == (3, 224, 224)
    assert options["watch"] is not None


def test_the_data_know_the_input_shape_where_none_is_given(calls):
    invoke(*RUN, "--data", "digits")
    assert calls.search[1]["input_shape"] == (1, 8, 8)


def test_help_tells_the_real_defaults():
    shown = " ".join(invoke("run", "--help").stdout.split())
    for name in ("trials", "out", "device", "seed", "space"):
        assert re.search(rf"--{name} [^\]]*\[default: {getattr(Settings(), name)}\]", shown), name
    assert f"[default: {Settings().final_epochs:g}]" in shown
    for name, default in (("batch", Settings().latency_batch), ("threads", Settings().latency_threads)):
        assert re.search(rf"--latency-{name} [^\]]*\[default: {default}\]", shown), name
    shown = " ".join(invoke("bench", "--help").stdout.split())
    assert re.search(rf"--batch [^\]]*\[default: {Settings().batch[0]}\]", shown)
    assert re.search(rf"--seconds [^\]]*\[default: {Settings().seconds:g}\]", shown)
    shown = " ".join(invoke("finetune", "--help").stdout.split())
    for option, name in (("epochs", "epochs"), ("batch-size", "batch_size"), ("label-weight", "label_weight")):
        assert re.search(rf"--{option} [^\]]*\[default: {getattr(Settings(), name):g}\]", shown), name


def test_the_file_fills_up_and_the_line_wins(calls):
    Path("kronsearch.yaml").write_text("model: zoo:digits\nbudget-flops: 50%\ntrials: 4\nseed: 2\nquiet: true\n")
    result = invoke("run", "--trials", "6")
    assert calls.load_model[0] == "zoo:digits"
    assert (calls.search[1]["trials"], calls.search[1]["seed"]) == (6, 2)
    assert calls.search[1]["watch"].__name__ == "ignore"
    assert result.stderr == ""


def test_a_command_ignores_what_the_file_says_for_others(plan):
    Path("kronsearch.yaml").write_text("trials: 4\nbudget-flops: 1G\n")
    save_plan(plan, "plan.json")
    assert "zoo:digits" in invoke("show", "plan.json").stdout


@pytest.mark.parametrize("command", [("run",), ("profile",), ("show", "plan.json"), ("apply", "p", "--out", "o")])
def test_a_malformed_file_is_one_line(command):
    Path("kronsearch.yaml").write_text("trials: [\n")
    result = invoke(*command, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: kronsearch.yaml, line 2: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "--budget-flops", "1G"), "error: no --model given: pass --model SPEC"),
        (("run", "--model", "zoo:digits"), "error: no budget given"),
        (("run", "--model", "zoo:digits", "--budget-flops", "lots"), "error: a budget of flops 'lots'"),
        (("run", "--model", "zoo:digits", "--budget-flops", "1G", "--timeout", "1d"), "error: --timeout 1d: write a"),
        (("run", "--model", "zoo:digits", "--budget-latency", "5"), "error: a budget of latency '5' can't be read"),
        (("run", "--model", "zoo:digits", "--latency-batch", "0"), "error: --latency-batch 0: "),
        (("sweep", "--model", "zoo:digits", "--budget-latency", "5ms"), "error: one budget given: pass several"),
        (("sweep", "--budget-flops", "30%,50%"), "error: no --model given"),
        (("sweep", "--model", "zoo:digits"), "error: no budgets given: pass several"),
        (("sweep", "--model", "zoo:digits", "--budget-flops", "50%"), "error: one budget given: pass several"),
        (("sweep", "--model", "zoo:digits", "--budget-flops", "1:2"), "error: budgets of flops 1:2 can't be read"),
        (("bench", "p.json"), "error: no --model given"),
        (("bench", "--model", "zoo:digits"), "error: nothing to compare with: pass a plan.json"),
        (("bench", "--model", "zoo:digits", "--weights", "w.pt"), "error: nothing to compare with: pass a plan.json"),
        (("bench", "p.json", "--model", "zoo:digits"), "error: can't read the plan p.json"),
        (("bench", "p.safetensors", "--model", "zoo:digits"), "error: p.safetensors is not a compressed network"),
        (("bench", "p.json", "--model", "zoo:digits", "--batch", "0"), "error: --batch 0: write one count or several"),
        (("finetune", "p.json"), "error: no --model given"),
        (("finetune", "p.json", "--model", "zoo:digits"), "error: can't read the plan p.json"),
        (("finetune", "p.safetensors", "--model", "zoo:digits"), "error: no --data given"),
        (("finetune", "p.json", "--lr", "0"), "error: --lr 0.0: Input should be greater than 0"),
        (("finetune", "p.json", "--val-fraction", "1"), "error: --val-fraction 1.0: Input should be less than 1"),
        (("finetune", "p.json", "--label-weight", "2"), "error: --label-weight 2.0: Input should be less than or"),
        (("profile",), "error: no --model given"),
        (("profile", "--model", "zoo:digit"), "error: "),
        (("show", "none.json"), "error: can't read the plan none.json"),
        (("apply", "none.json", "--model", "zoo:digits", "--out", "o"), "error: can't read the plan none.json"),
        (("evaluate", "--data", "digits"), "error: no --model given"),
        (("evaluate", "--model", "zoo:digits"), "error: no --data given"),
        (("evaluate", "--model", "zoo:digits", "--data", "digit"), "error: "),
        (("evaluate", "--model", "zoo:digits", "--data", "digits", "--split", "train"), "error: --split train: Input"),
        (("evaluate", "--model", "zoo:digits", "--data", "digits", "--weights", "no.safetensors"), "error: "),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_leaves_no_file(args, message):
    result = invoke(*args, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("args", [("run", "--trials", "x"), ("run", "--budget", "1G"), ("show",), ("nothing",)])
def test_usage_errors_exit_with_two(args):
    result = invoke(*args, code=2)
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_an_error_of_the_library_is_one_line(calls):
    calls.error = BudgetError("too\nsmall \x1b[31m")
    result = invoke(*RUN, code=2)
    assert result.stderr == "error: too small ?[31m\n"
    assert "Traceback" in invoke(*RUN, "--debug", code=2).stderr


def test_a_fault_of_the_program_is_one_line_with_a_hint(calls):
    calls.error = IndexError("out of range")
    result = invoke(*RUN, code=1)
    assert result.stderr == "error: IndexError: out of range (run again with --debug for the traceback)\n"
    result = invoke(*RUN, "--debug", code=1)
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: IndexError: out of range\n")


def test_debug_may_stand_in_the_file(calls):
    Path("kronsearch.yaml").write_text("debug: true\n")
    calls.error = IndexError("out of range")
    assert "Traceback" in invoke(*RUN, code=1).stderr


def test_an_interrupted_search_tells_how_to_resume(calls):
    calls.error = KeyboardInterrupt()
    assert invoke(*RUN, code=130).stderr == "interrupted: the same line again resumes the study\n"


@pytest.fixture
def tuned(calls, plan, monkeypatch):
    """Put a double in the place of the library's fine-tune, and return what it was called with."""
    calls.tuned, calls.error = [], None

    def finetune(*args, **options):
        calls.tuned.append((args, options))
        if calls.error is not None:
            raise calls.error
        result = Evaluation(0.5, 1.0, None, 10)
        return SimpleNamespace(plan=plan, dense=result, compressed=result, was_done=False, out=Path(options["out"]))

    double = ModuleType("kronsearch.finetuning.run")
    double.finetune = finetune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kronsearch.finetuning.run", double)
    save_plan(plan, "plan.json")
    return calls


TUNE = ("finetune", "plan.json", "--model", "m:f", "--data", "digits")


def test_options_reach_the_fine_tune(tuned):
    result = invoke(
        *(*TUNE, "--model-args", '{"a": 1}', "--weights", "w.pt", "--epochs", "0.5", "--lr", "1e-3", "--seed", "5"),
        *("--batch-size", "64", "--label-weight", "0.25", "--compile", "--out", "there", "--device", "cpu", "--quiet"),
        *("--val-fraction", "0.02"),
    )
    assert tuned.load_model == ("m:f", "w.pt", {"a": 1})
    assert (tuned.load_data, tuned.val_fraction) == (("digits", 5), 0.02)
    [(args, options)] = tuned.tuned
    assert options.pop("watch").__name__ == "ignore"
    assert args == (tuned.model, Path("plan.json"), tuned.data)
    assert options == {
        "epochs": 0.5,
        "lr": 1e-3,
        "batch_size": 64,
        "label_weight": 0.25,
        "compiled": True,
        "out": "there",
        "device": "cpu",
        "seed": 5,
    }
    assert "test accuracy" in result.stdout
    assert "written to there: compressed.safetensors, log.csv" in result.stdout
    assert result.stderr == ""


def test_the_fine_tune_has_its_own_defaults_and_the_data_are_split_by_the_plans_seed(tuned, plan):
    invoke(*TUNE, "--weights", "w.pt")
    [(_, options)] = tuned.tuned
    assert (tuned.load_data, tuned.val_fraction) == (("digits", plan.decomposition.seed), None)
    assert options["out"] == "kronsearch-finetuned"
    for name in ("epochs", "lr", "batch_size", "label_weight", "seed"):
        assert options[name] == getattr(Settings(), name)
    Path("kronsearch.yaml").write_text("out: folder\nbatch-size: 32\n")
    invoke(*TUNE, "--weights", "w.pt")
    assert (tuned.tuned[1][1]["out"], tuned.tuned[1][1]["batch_size"]) == ("folder", 32)


def test_an_interrupted_fine_tune_tells_how_to_resume(tuned):
    tuned.error = KeyboardInterrupt()
    told = "interrupted: the same line again resumes the fine-tune\n"
    assert invoke(*TUNE, "--weights", "w.pt", code=130).stderr == told


def test_of_several_processes_only_the_first_one_tells(tuned, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke(*TUNE)
    assert (result.stdout, result.stderr) == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert "test accuracy" in invoke(*TUNE).stdout


def test_random_weights_are_warned_about_on_stderr(calls):
    result = invoke("run", "--model", "torchvision:resnet18", "--budget-flops", "1G", "--quiet")
    assert "warning: no --weights: those of torchvision:resnet18 are random" in result.stderr
    assert "warning" not in result.stdout
    assert invoke(*RUN, "--quiet").stderr == ""
    assert invoke(*RUN, "--quiet", "--weights", "w.pt", "--model", "torchvision:resnet18").stderr == ""


def test_cuda_where_there_is_none_is_one_line(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert invoke(*RUN, "--device", "cuda", code=2).stderr.startswith("error: --device cuda: there is no CUDA device")


def test_a_model_of_unknown_input_asks_for_it(calls, monkeypatch):
    monkeypatch.setattr("kronsearch.models.loading.default_input_shape", lambda spec, model: None)
    assert "pass --input-shape" in invoke(*RUN, code=2).stderr


@pytest.mark.parametrize(("given", "seed"), [((), 3), (("--seed", "8"), 8)])
def test_apply_splits_the_data_by_the_plans_seed_unless_another_is_given(calls, plan, monkeypatch, given, seed):
    save_plan(plan, "plan.json")
    made = []
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", lambda *args, **options: made.append((args, options)))
    monkeypatch.setattr("kronsearch.models.apply.save_compressed", lambda *args: made.append(args))
    result = invoke(
        *("apply", "plan.json", "--model", "zoo:digits", "--data", "digits", "--out", "small.safetensors", "--quiet"),
        *given,
    )
    assert calls.load_data == ("digits", seed)
    assert made[0][1].pop("watch").__name__ == "ignore"
    assert made == [((calls.model, plan, calls.data), {"device": "cpu"}), (None, plan, Path("small.safetensors"))]
    assert "written to small.safetensors" in result.stdout


@pytest.mark.parametrize(
    "line",
    [
        ("apply", "plan.json", "--model", "zoo:digits", "--out", "small.safetensors"),
        ("evaluate", "plan.json", "--model", "zoo:digits", "--data", "digits"),
        ("bench", "plan.json", "--model", "zoo:digits"),
    ],
)
def test_a_plan_being_applied_is_seen_on_stderr_unless_quiet(calls, plan, monkeypatch, line):
    def apply_plan(*args, watch, **options):
        watch(Progress(phase="apply", done=0, total=2, message="conv1"))
        return nn.Identity()

    save_plan(plan, "plan.json")
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", apply_plan)
    monkeypatch.setattr("kronsearch.models.apply.save_compressed", lambda *args: None)
    monkeypatch.setattr("kronsearch.training.evaluate.evaluate", lambda *args, **options: Evaluation(0.5, 1.0, None, 1))
    monkeypatch.setattr("kronsearch.models.bench.bench", lambda *args, **options: [])
    assert "applying the plan 0/2: conv1\n" in invoke(*line).stderr
    assert "applying" not in invoke(*line, "--quiet").stderr


def test_evaluate_has_no_seed_and_takes_none_from_the_file(calls, plan, monkeypatch):
    save_plan(plan, "plan.json")
    Path("kronsearch.yaml").write_text(f"seed: {plan.decomposition.seed + 1}\n")
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", lambda model, *args, **options: nn.Identity())
    scores = Evaluation(0.5, 1.0, None, 10)
    monkeypatch.setattr("kronsearch.training.evaluate.evaluate", lambda *args, **options: scores)
    invoke("evaluate", "plan.json", "--model", "zoo:digits", "--data", "digits")
    assert (calls.load_data, calls.val_fraction) == (("digits", plan.decomposition.seed), None)
    line = ("--split", "val", "--val-fraction", "0.25")
    invoke("evaluate", "plan.json", "--model", "zoo:digits", "--data", "digits", *line)
    assert calls.val_fraction == 0.25


def test_the_arguments_of_a_plan_are_not_obeyed(calls, plan, monkeypatch):
    """A plan may come from anyone; a model's arguments can name files and addresses."""
    save_plan(plan, "plan.json")
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", lambda *args, **options: None)
    monkeypatch.setattr("kronsearch.models.apply.save_compressed", lambda *args: None)
    invoke("apply", "plan.json", "--model", "zoo:digits", "--out", "small.safetensors")
    assert plan.model.args
    assert calls.load_model == ("zoo:digits", None, {})


def test_the_files_out_is_not_the_one_of_apply(plan):
    Path("kronsearch.yaml").write_text("out: folder\n")
    save_plan(plan, "plan.json")
    assert "--out" in invoke("apply", "plan.json", "--model", "zoo:digits", code=2).stderr


def test_the_program_runs_as_a_module_and_through_a_closed_pipe(plan, tmp_path):
    save_plan(plan, "plan.json")
    line = f"{sys.executable} -c 'from kronsearch.cli import main; main()' show plan.json | head -n 1"
    shell = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=True, env=env())
    assert shell.stdout.count("\n") == 1
    assert "Traceback" not in shell.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("arguments", [["show", "plan.json"], ["show", "--help"]], ids=["show", "help"])
def test_results_that_can_not_be_written_are_told_in_one_line(arguments, plan, tmp_path):
    save_plan(plan, "plan.json")
    line = [sys.executable, "-c", "from kronsearch.cli import main; main()", *arguments]
    with Path("/dev/full").open("w") as full:
        shell = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env())
    assert shell.returncode == 2
    assert shell.stderr == "error: can't write the results to stdout (No space left on device): pass another place\n"


def test_a_terminal_that_has_no_sign_for_it_gets_another(plan, tmp_path):
    save_plan(plan, "plan.json")
    shell = subprocess.run(
        [sys.executable, "-c", "from kronsearch.cli import main; main()", "show", "plan.json"],
        capture_output=True,
        cwd=tmp_path,
        check=True,
        env=env() | {"PYTHONIOENCODING": "ascii"},
    )
    assert b"8?1?3?1 ? 1?4?1?3, R 2" in shell.stdout


def env() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}


def test_each_command_has_a_help():
    for name in commands.__all__:
        assert f" {name} [OPTIONS]" in invoke(name, "--help").stdout


def test_apply_warns_of_a_network_above_the_plans_budget(calls, plan, monkeypatch):
    save_plan(plan, "plan.json")
    over = plan.model_copy(
        update={
            "compressed": plan.dense,
            "budget": plan.budget.model_copy(update={"max_macs": plan.dense.macs - 1, "max_params": None}),
        }
    )
    monkeypatch.setattr("kronsearch.models.apply.apply_plan", lambda *args, **options: None)
    monkeypatch.setattr("kronsearch.models.apply.save_compressed", lambda *args: None)
    monkeypatch.setattr("kronsearch.models.apply.measured", lambda plan, model, small: over)
    result = invoke("apply", "plan.json", "--model", "zoo:digits", "--out", "small.safetensors")
    assert f"are above the plan's budget of {plan.dense.macs - 1}" in result.stderr


def test_apply_writes_safetensors_only(calls, plan):
    save_plan(plan, "plan.json")
    result = invoke("apply", "plan.json", "--model", "zoo:digits", "--out", "small.pt", code=2)
    assert "pass a name such as small.safetensors" in result.stderr
