"""What the tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch import nn

from kronsearch.plan import (
    Cost,
    Decomposition,
    LayerPlan,
    ModelIdentity,
    Plan,
    PlanBudget,
    Provenance,
    Score,
    fingerprint,
)
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.data import Data

# The same examples each time, and no deadline: a busy machine is no error.
settings.register_profile("kronsearch", derandomize=True, deadline=None)
settings.load_profile("kronsearch")

# A process for each core: threads of several would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

SPEC = SeKronSpec(((8, 1, 3, 1), (1, 4, 1, 3)), (2,))


@pytest.fixture(scope="session")
def digits_model() -> nn.Module:
    from kronsearch.models.loading import load_model

    return load_model("zoo:digits")


@pytest.fixture(scope="session")
def digits_data() -> Data:
    from kronsearch.training.sources import load_data

    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def short_proxies() -> Iterator[None]:
    """Let finalists be fine-tuned on a sixteenth of the images, for the time that it takes."""
    from kronsearch.search import score

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "_PROXY_IMAGES", score._PROXY_IMAGES // 16)
        yield


@pytest.fixture(scope="session")
def filled_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return what has a folder filled by one of the processes that share the tests, and copies it for each."""

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        own = tmp_path_factory.mktemp(name)
        if worker_id == "master":
            fill(own)
            return own
        shared, done = (tmp_path_factory.getbasetemp().parent / (name + end) for end in ("", ".done"))
        with FileLock(f"{shared}.lock"):
            if not done.exists():
                shutil.rmtree(shared, ignore_errors=True)
                shared.mkdir()
                fill(shared)
                done.touch()
        shutil.copytree(shared, own, dirs_exist_ok=True)
        return own

    return filled


@pytest.fixture
def plan() -> Plan:
    """Return a plan of two layers, one of them replaced."""
    layers = {
        "conv": LayerPlan(kernel_shape=(8, 4, 3, 3), spec=SPEC, error=0.0625),
        "head": LayerPlan(kernel_shape=(10, 8), dense="no candidate costs less"),
    }
    return Plan(
        model=ModelIdentity(spec="zoo:digits", args={"width": 8}, fingerprint=fingerprint(layers)),
        input_shape=(4, 8, 8),
        budget=PlanBudget(flops="50%", max_macs=10_000),
        dense=Cost(macs=20_000, params=8 * 4 * 3 * 3 + 10 * 8),
        compressed=Cost(macs=9_000, params=SPEC.params + 10 * 8),
        layers=layers,
        decomposition=Decomposition(calibration_images=256, batchnorm_images=512, seed=3),
        predicted_error=0.125,
        score=Score(metric="accuracy", value=0.9765, examples=144),
        provenance=Provenance(versions={"kronsearch": "0.1.0"}, seed=3, study="digits", trial=7, gap=0.0001),
    )
