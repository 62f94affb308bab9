"""Two processes on the CPU, started as a user would start them."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kronsearch.plan import save_plan

PROGRAM = Path(__file__).with_name("together.py")
PATIENCE = 240  # seconds for what takes about fifteen


@pytest.fixture(scope="module")
def folder(filled_once, plan):
    """Return the folder in which two processes have left what they had in the end."""

    def train(folder):
        save_plan(plan, folder / "plan.json")
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        done = subprocess.run(
            (*torchrun, str(PROGRAM), str(folder)),
            env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert "Warning" not in done.stderr

    return filled_once("together", train)


def both(folder, name):
    return load_file(folder / f"{name}-0.safetensors"), load_file(folder / f"{name}-1.safetensors")


@pytest.mark.parametrize("name", ["plain", "first", "again"])
def test_all_processes_end_with_the_same(folder, name):
    ours, theirs = both(folder, name)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_what_is_done_is_told_to_all(folder):
    assert {path.name for path in (folder / "out-2").glob("[!.]*")} == {
        "checkpoint.safetensors",
        "compressed.safetensors",
        "log.csv",
    }
    first, again = both(folder, "first")[0], both(folder, "again")[1]
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_they_learn(folder):
    with (folder / "out-2/log.csv").open() as file:
        divergence = [float(row["divergence"]) for row in csv.DictReader(file)]
    assert len(divergence) == 3
    assert divergence[-1] < divergence[0]


def test_without_batch_norms_they_do_what_one_process_does(folder, plan, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    runpy.run_path(str(PROGRAM))["main"](tmp_path)
    alone, together = load_file(tmp_path / "plain-0.safetensors"), both(folder, "plain")[0]
    start = runpy.run_path(str(PROGRAM))["network"](runpy.run_path(str(PROGRAM))["Plain"]).state_dict()
    for name, tensor in alone.items():
        # Adam divides by gradients that may be all rounding: a few entries are a little further apart
        torch.testing.assert_close(together[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    moved = (alone["head.weight"] - start["head.weight"]).abs().max()
    assert moved > 0.02
