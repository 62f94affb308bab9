"""The command line as a user runs it: a process, the digits network and its data, and the files that stay."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from kronsearch.cli import app
from kronsearch.models.apply import stored_plan
from kronsearch.models.checkpoint import load_state_dict
from kronsearch.plan import load_plan

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("short_proxies")
# the same in processes of their own
SHORT = "from kronsearch.search import score; score._PROXY_IMAGES //= 16"
PROGRAM = (sys.executable, "-c", f"{SHORT}; from kronsearch.cli import main; main()")
MODEL = ("--model", "zoo:digits")
RUN = ("run", *MODEL, "--data", "digits", "--budget-flops", "50%", "--final-epochs", "0.2")
PATIENCE = 300  # seconds for anything; a search of two trials takes about ten, where nothing else runs
ENDED = ("COMPLETE", "PRUNED")


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        (*PROGRAM, *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a process to end well and return what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out, err


def kronsearch(*args: str, cwd: Path, code: int = 0) -> tuple[str, str]:
    """Run the command line in this process, to spare time, and return what it wrote to stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        result = CliRunner().invoke(app, args)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def refused(*args: str, cwd: Path) -> str:
    """Run what must be refused in one line without a result, and return the line."""
    out, err = kronsearch(*args, cwd=cwd, code=2)
    assert out == ""
    [line] = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


def but_for_times(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith("time: ")]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


_TRIALS = "SELECT number, state FROM trials JOIN studies USING (study_id) WHERE study_name = 'kronsearch'"


def trials_of(study: Path, *states: str) -> set[int]:
    """Return the numbers of a study's trials in these states; those of its finals are of another study."""
    if not study.exists():
        return set()
    with closing(sqlite3.connect(f"file:{study}?mode=ro", uri=True, timeout=10)) as connection:
        try:
            rows = connection.execute(_TRIALS).fetchall()
        except sqlite3.OperationalError:  # the tables are not there yet
            return set()
    return {number for number, state in rows if state in states}


@pytest.fixture(scope="module")
def finished(filled_once) -> Path:
    """Return a folder in which a search of two trials has run to its end, with what it wrote kept in two files."""

    def search(folder: Path) -> None:
        out, err = finish(start(*RUN, "--trials", "2", "--out", "found", cwd=folder))
        (folder / "stdout").write_text(out)
        (folder / "stderr").write_text(err)

    return filled_once("finished", search)


def test_a_search_ends_with_a_table_and_its_files(finished):
    plan = load_plan(finished / "found/plan.json")
    assert plan.budget.max_macs is not None
    assert plan.compressed.macs <= plan.budget.max_macs <= plan.dense.macs / 2
    out = (finished / "stdout").read_text()
    for words in (
        "flops (MACs, as fvcore counts)",
        "params",
        "test accuracy",
        "% used",
        "proven gap",
        "plain allocation",
        "best: trial",
        "of it fine-tuning",
        "written to found",
    ):
        assert words in out
    assert {"plan.json", "compressed.safetensors", "study.db", "trials.csv"} <= names_in(finished / "found")


def test_progress_is_plain_lines_on_stderr_with_the_budget(finished):
    err = (finished / "stderr").read_text()
    assert "\x1b" not in err
    assert "\r" not in err
    trials = [line for line in err.splitlines() if line.startswith("trials 2/2")]
    assert trials
    assert all("least divergence " in line and "MACs " in line for line in trials)
    assert "[I 2" not in err  # the study's own log


def test_the_plan_is_shown(finished):
    out, err = kronsearch("show", "found/plan.json", cwd=finished)
    plan = load_plan(finished / "found/plan.json")
    assert err == ""
    assert all(name in out for name in plan.layers)
    assert all(str(spec) in out for spec in plan.replaced.values())


def test_the_compressed_network_is_evaluated_as_the_search_did(finished):
    out, _ = kronsearch(
        *("evaluate", *MODEL, "--weights", "found/compressed.safetensors", "--data", "digits"), cwd=finished
    )
    [line] = [line for line in out.splitlines() if "accuracy" in line and "│" in line]
    [told] = [line for line in (finished / "stdout").read_text().splitlines() if "test accuracy" in line]
    assert line.split("│")[2].strip() == told.split("│")[3].strip()


def test_a_plan_is_applied_and_evaluated_two_ways_alike(finished):
    plan = ("found/plan.json", *MODEL, "--data", "digits")
    applied, err = kronsearch("apply", *plan, "--out", "small.safetensors", cwd=finished)
    assert "written to small.safetensors" in applied
    count = len(load_plan(finished / "found/plan.json").replaced)
    assert re.fullmatch(rf"gathering statistics of activations\napplying the plan 0/{count}: \S+\n", err)
    on_the_fly, _ = kronsearch("evaluate", *plan, cwd=finished)
    from_the_file, _ = kronsearch(
        *("evaluate", *MODEL, "--weights", "small.safetensors", "--data", "digits"), cwd=finished
    )
    assert on_the_fly == from_the_file


def goes_on_from_an_epoch(folder: Path) -> bool:
    """Tell whether a fine-tune has written its log, and then what it is resumed from."""
    log, checkpoint = folder / "log.csv", folder / "checkpoint.safetensors"
    return log.exists() and checkpoint.stat().st_mtime_ns > log.stat().st_mtime_ns


def test_a_fine_tune_that_was_killed_ends_with_the_same_weights(finished):
    """All in processes of their own: what other tests leave in this one, such as threads, changes roundings."""
    line = ("finetune", "found/compressed.safetensors", *MODEL, "--data", "digits", "--epochs", "4", "--out")
    out, err = finish(start(*line, "whole", cwd=finished))
    assert "test accuracy" in out
    assert "written to whole: compressed.safetensors, log.csv" in out
    assert re.search(r"^fine-tuning 10/40: best 0\.\d+, \w+ left, epoch 1 scored 0\.\d+, loss ", err, re.MULTILINE)
    process = start(*line, "killed", cwd=finished)
    began = time.monotonic()
    try:
        while not goes_on_from_an_epoch(finished / "killed"):
            assert process.poll() is None
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)
        time.sleep(0.1)  # somewhere in an epoch
    finally:
        process.kill()
        process.communicate()
    steps = len((finished / "killed/log.csv").read_text().splitlines())
    assert 2 <= steps < 5
    resumed, err = finish(start(*line, "killed", cwd=finished))
    assert re.search(r"^fine-tuning [1-3]0/40: best", err, re.MULTILINE)
    assert resumed == out.replace("whole", "killed")
    for name in ("compressed.safetensors", "checkpoint.safetensors"):
        ours, theirs = (load_state_dict(finished / folder / name) for folder in ("whole", "killed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again, err = kronsearch(*line, "killed", cwd=finished)
    assert again == resumed.replace("written to", "had been fine-tuned before, see")
    assert "fine-tuning" not in err
    assert "epochs was 4.0, is 9.0" in refused(*line, "killed", "--epochs", "9", cwd=finished)


def test_a_fine_tune_that_can_not_be_is_refused(finished, tmp_path):
    small, plan = str(finished / "found/compressed.safetensors"), str(finished / "found/plan.json")
    data = ("--data", "digits")
    for args, words in (
        ((plan, *MODEL), "no --data given"),
        ((plan, *MODEL, "--data", "digitz"), "digitz"),
        ((plan, *MODEL, *data, "--epochs", "0"), "--epochs 0.0: Input should be greater than 0"),
        ((plan, "--model", "zoo:cifar_resnet20", "--data", "digits"), "shape"),
        ((small, *MODEL, *data, "--out", str(finished / "found")), "is there already"),
        (("none.safetensors", *MODEL, *data), "none.safetensors"),
        ((plan, *MODEL, *data, "--lr", "1e30", "--epochs", "1", "--out", str(tmp_path / "gone")), "diverged at step"),
    ):
        assert words in refused("finetune", *args, "--quiet", cwd=tmp_path)
    assert [path.name for path in tmp_path.rglob("[!.]*")] == ["gone", "checkpoint.safetensors"]
    assert not (finished / "found/.lock").exists()


def test_a_front_is_written_and_one_of_its_plans_applied(finished):
    """The statistics and tables are those of the search."""
    line = ("sweep", *MODEL, "--data", "digits", "--budget-flops", "30%:70%:3", "--cache", "found/cache")
    out, err = kronsearch(*line, "--out", "front", cwd=finished)
    assert "plans/flops-50pct.json" in out
    assert "weighed error" in out
    assert re.findall("^budgets.*$", err, re.MULTILINE) == ["budgets 0/3"]
    assert names_in(finished / "front") == {"front.csv", "plans"}
    plan = ("front/plans/flops-50pct.json", *MODEL, "--data", "digits")
    applied, err = kronsearch("apply", *plan, "--out", "middle.safetensors", "--quiet", cwd=finished)
    assert "written to middle.safetensors" in applied
    assert err == ""


def test_plan_and_compressed_network_are_timed(finished):
    line = ("bench", *MODEL, "--seconds", "0.01", "--quiet")
    for args in (
        ("found/plan.json",),
        ("found/compressed.safetensors",),
        ("--weights", "found/compressed.safetensors"),
    ):
        out, err = kronsearch(*line, *args, "--csv", "timings.csv", cwd=finished)
        replaced = load_plan(finished / "found/plan.json").replaced
        assert all(name in out for name in ("(the whole network)", *replaced))
        assert err == ""
        rows = (finished / "timings.csv").read_text().splitlines()
        assert len(rows) == 1 + 1 + len(replaced)


def test_a_finished_search_gives_the_same_again(finished):
    out, _ = kronsearch(*RUN, "--trials", "2", "--out", "found", "--quiet", cwd=finished)
    assert but_for_times(out) == but_for_times((finished / "stdout").read_text())


def test_a_study_of_another_budget_is_refused(finished):
    before = {path.name: path.stat().st_mtime_ns for path in (finished / "found").iterdir()}
    line = refused(
        *("run", *MODEL, "--data", "digits", "--budget-flops", "40%", "--trials", "2", "--out", "found"), cwd=finished
    )
    assert "budget" in line
    assert {path.name: path.stat().st_mtime_ns for path in (finished / "found").iterdir()} == before


def test_killed_in_a_trial_the_same_line_ends_the_search(finished, tmp_path):
    line = ("run", *MODEL, "--data", "digits", "--budget-flops", "1M", "--final-epochs", "0.2", "--trials", "6")
    line = (*line, "--out", "found", "--cache", str(finished / "found/cache"))
    study = tmp_path / "found/study.db"
    process = start(*line, cwd=tmp_path)
    began = time.monotonic()
    try:
        while not (trials_of(study, *ENDED) and trials_of(study, "RUNNING")):
            assert process.poll() is None
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    survivors, running = trials_of(study, *ENDED), trials_of(study, "RUNNING")
    assert survivors == set(range(len(survivors)))
    assert running <= {len(survivors)}  # none, if it was between two trials by then
    assert "plan.json" not in names_in(tmp_path / "found")
    _, err = kronsearch(*line, cwd=tmp_path)
    assert re.search(r"^trials 6/6: least divergence \d\.\d+, MACs [\d.]+ k of 1 M \(9\d\.\d%\)", err, re.MULTILINE)
    assert not any(
        f"trial {number} scored" in line for number in survivors for line in err.splitlines() if "trials" in line
    )
    ended = trials_of(study, *ENDED)
    assert ended == set(range(6 + len(running))) - running
    assert trials_of(study, "FAIL") == running
    assert load_plan(tmp_path / "found/plan.json").provenance.trial in ended


def test_two_workers_on_one_line_share_the_trials_and_end_alike(tmp_path):
    (tmp_path / "space.yaml").write_text("structures: [spatial]\n")
    line = (*RUN, "--trials", "5", "--space", "space.yaml", "--out", "found", "--cache", "cache")
    line = (*line, "--allow-slower")  # times nothing, for each would have a time of its own
    workers = [start(*line, cwd=tmp_path) for _ in range(2)]
    (one, _), (other, _) = [finish(worker) for worker in workers]
    assert but_for_times(one) == but_for_times(other)
    table = pd.read_csv(tmp_path / "found/trials.csv")
    assert sorted(table["slot"]) == list(range(5))
    assert load_plan(tmp_path / "found/plan.json") == stored_plan(tmp_path / "found/compressed.safetensors")
    left = {"plan.json", "compressed.safetensors", "study.db", "trials.csv", "final", ".final.lock"}
    assert names_in(tmp_path / "found") == left
    again, _ = kronsearch(*line, "--quiet", cwd=tmp_path)
    assert but_for_times(again) == but_for_times(one)


def test_without_data_the_plan_rests_on_the_weights(tmp_path):
    out, _ = kronsearch("run", *MODEL, "--budget-params", "50%", "--trials", "2", "--quiet", cwd=tmp_path)
    assert "predicted error" in out
    assert "accuracy" not in out
    plan = load_plan(tmp_path / "kronsearch-out/plan.json")
    assert plan.compressed.params <= plan.dense.params / 2
    assert plan.decomposition.calibration_images == 0


def test_a_profile_tells_the_smallest_reachable_cost(tmp_path):
    out, err = kronsearch("profile", *MODEL, cwd=tmp_path)
    assert "smallest reachable" in out
    assert "can be replaced" in out
    assert err == ""
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--budget-flops", "10"), "10"),  # below what can be reached
        (("--budget-params", "10"), "10"),
        (("--budget-flops", "1T"), "kept by the dense model already"),
        (("--budget-flops", "100%"), "kept by the dense model already"),
    ],
)
def test_a_budget_that_can_not_be_is_refused(args, words, tmp_path):
    assert words in refused("run", *MODEL, "--data", "digits", *args, cwd=tmp_path)
    assert names_in(tmp_path) == set()


def test_a_front_that_can_not_be_is_refused(tmp_path):
    for budgets, words in (("10,20", "smallest that this model"), ("50%:100%:3", "kept by the dense model already")):
        assert words in refused("sweep", *MODEL, "--data", "digits", "--budget-flops", budgets, cwd=tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "zoo:digitz"), "digits"),
        (("--model", "digits"), "zoo:"),
        ((*MODEL, "--data", "digitz"), "digitz"),
        ((*MODEL, "--weights", "none.pth"), "none.pth"),
        ((*MODEL, "--space", "none"), "none"),
        ((*MODEL, "--model-args", '{"no_such": 1}'), "no_such"),
        ((*MODEL, "--input-shape", "3,8,8"), "3, 8, 8"),
    ],
)
def test_what_is_not_there_is_refused(args, words, tmp_path):
    assert words in refused("run", *args, "--budget-flops", "50%", cwd=tmp_path)
    assert names_in(tmp_path) == set()


def test_a_malformed_space_or_file_of_options_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_text("structures: [spatial\n")
    assert "line 2" in refused("run", *MODEL, "--budget-flops", "50%", "--space", "space.yaml", cwd=tmp_path)
    (tmp_path / "space.yaml").unlink()
    (tmp_path / "kronsearch.yaml").write_text("model: zoo:digits\nbudget-flops: [\n")
    assert "kronsearch.yaml, line 3" in refused("run", cwd=tmp_path)
    assert names_in(tmp_path) == {"kronsearch.yaml"}


def test_a_plan_of_another_schema_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"schema_version": 99}))
    for args in (
        ("show", "plan.json"),
        ("apply", "plan.json", *MODEL, "--out", "small.safetensors"),
        ("evaluate", "plan.json", *MODEL, "--data", "digits"),
    ):
        line = refused(*args, cwd=tmp_path)
        assert "schema_version 99" in line
        assert "reads 1" in line
    assert names_in(tmp_path) == {"plan.json"}


def test_a_plan_for_another_network_is_refused(finished, tmp_path):
    plan = str(finished / "found/plan.json")
    line = refused("apply", plan, "--model", "zoo:cifar_resnet20", "--out", "small.safetensors", cwd=tmp_path)
    assert "zoo:digits" in line
    assert names_in(tmp_path) == set()


def test_what_libraries_print_does_not_mix_with_results(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import os\nimport torch\n"
        "def make():\n    os.write(1, b'from a library\\n')\n    print('from Python')\n"
        "    return torch.nn.Linear(4, 2)\n"
    )
    out, err = finish(start("profile", "--model", "noisy:make", "--input-shape", "4", cwd=tmp_path))
    assert "from a library" not in out
    assert "from a library" in err
    assert "from Python" in out
