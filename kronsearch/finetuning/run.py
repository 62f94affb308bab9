"""A long fine-tune of a compressed network with the dense one as its teacher, which can be stopped and resumed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kronsearch.choices import check_seed
from kronsearch.errors import TrainingError, check_kind
from kronsearch.files import alone, make_folder
from kronsearch.finetuning.course import APPLIED, Course, Found, Start, long_settings
from kronsearch.finetuning.loop import COMPRESSED
from kronsearch.finetuning.record import Row
from kronsearch.finetuning.validation import tested
from kronsearch.models.apply import apply_plan, load_compressed, stored_plan
from kronsearch.models.checkpoint import check_storable, fingerprint_weights
from kronsearch.plan import Plan, holds_weights, load_plan
from kronsearch.progress import Phase, Progress, Watcher, ignore
from kronsearch.training.copies import check_network, copied
from kronsearch.training.data import Data, check_data, check_splits
from kronsearch.training.evaluate import Evaluation, evaluate
from kronsearch.training.modes import own_modes
from kronsearch.training.team import Team, join

__all__ = ["FinetuneResult", "finetune"]

_LOCK = ".lock"  # who is at it


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune hands back.

    Args:
        plan: of the network, with its cost.
        model: the network that was kept, see `kronsearch.finetuning.loop.supersedes`.
        dense: the dense network on the test split.
        compressed: the compressed one likewise.
        log: a row for each evaluation on the validation split.
        was_done: whether an earlier call had come to the end.
        out: where the files are.
    """

    plan: Plan
    model: nn.Module
    dense: Evaluation
    compressed: Evaluation
    log: pd.DataFrame
    was_done: bool
    out: Path


@own_modes()
def finetune(
    model: nn.Module,
    start: Plan | str | Path,
    data: Data,
    *,
    epochs: float = 10.0,
    lr: float | None = None,
    batch_size: int = 128,
    label_weight: float = 0.0,
    compiled: bool = False,
    out: str | Path = "kronsearch-finetuned",
    device: torch.device | str = "cpu",
    seed: int = 0,
    watch: Watcher = ignore,
) -> FinetuneResult:
    """Fine-tune a compressed network with the dense one as its teacher; called again likewise, it resumes.

    The student learns the teacher's outputs and, where shapes agree, those of its blocks; in long runs on mixtures of
    the training examples (see `TrainSettings`). After each epoch the average of its weights is scored on the validation
    split. The latest is in `compressed.safetensors`, in the second half unless it is worse than the one before (see
    `kronsearch.finetuning.loop.supersedes`), all scores are in `log.csv`. A fine-tune that is resumed from
    `checkpoint.safetensors` ends with the weights it would have had. Of several that are given one folder on one
    machine, one is at it, and the others wait.

    Started by `torchrun`, the processes train together: each takes its share of every batch of `batch_size`, and the
    first one writes.

    Args:
        model: the trained dense network; left untouched.
        start: a plan, which is applied to the network as `apply_plan` does, or its file; or the file of a compressed
            network.
        data: to train on.
        epochs: how long; fractions are allowed.
        lr: the highest learning rate; None takes one that suits the number of steps.
        batch_size: examples in a step, of all processes together.
        label_weight: how much of the loss is that of the labels, the rest is the divergence from the teacher.
        compiled: whether the networks run through `torch.compile`, which takes a minute at first and needs a compiler.
        out: folder for the files.
        device: to run on; of several processes each takes the CUDA device of its local rank.
        seed: of everything random.
        watch: is told of every step.

    Raises:
        TrainingError: the loss is no longer finite, or what is in `out` is of another fine-tune.
        KronsearchError: of another kind, where plan, network and data don't go together.
    """
    check_network(model)
    check_data(data)
    told = "what a fine-tune starts with is a Plan, its file, or the file of a compressed network"
    check_kind(told, start, (Plan, str, Path), TrainingError)
    check_seed(seed)
    team, own_device = join(device)
    watch = watch if team.leads else ignore
    settings = long_settings(
        data, epochs=epochs, lr=lr, batch_size=batch_size, label_weight=label_weight, compiled=compiled
    )
    dense = copied(model).to(own_device).eval()
    check_splits(data)  # what can't be done is known at once
    evaluate(dense, data, "val", limit=16, device=own_device)
    check_storable(dense.state_dict(), Path(out) / COMPRESSED)

    def tell(phase: Phase, done: int, total: int, message: str = "", best: float | None = None) -> None:
        watch(Progress(phase=phase, done=done, total=total, message=message, best=best))

    begin = _start(dense, Path(start) if isinstance(start, str) else start, data, own_device, watch)
    out = Path(out)
    course = Course(dense, begin, data, settings, out=out, device=own_device, seed=seed, team=team)
    if not out.exists():  # what is refused is refused before anything is written
        course.check_compiling()
    elif team.leads:
        _found(course, out)
    with _alone(out, team, lambda: tell("finetune", 0, 1, "another fine-tune is at it")):
        found = team.from_leader(_found(course, out) if team.leads else None)
        ended = course.run(found, None, lambda *told: tell("finetune", *told))
    first, second = tested(dense, ended.network, data, own_device, lambda done: tell("test", done, 2))
    log = pd.DataFrame([row.model_dump() for row in ended.record.log], columns=list(Row.model_fields))
    return FinetuneResult(ended.plan, ended.network, first, second, log, ended.was_done, out)


@contextmanager
def _alone(out: Path, team: Team, waits: Callable[[], None]) -> Iterator[None]:
    """Have the folder for one fine-tune at a time, of which the first process stands for its team."""
    if not team.leads:
        yield
        return
    make_folder(out)
    with alone(out / _LOCK, waits):
        yield


def _found(course: Course, out: Path) -> Found | None:
    """Return what there is to resume from."""
    found = course.found()
    if found is None and (out / COMPRESSED).exists():
        raise TrainingError(
            f"{out / COMPRESSED} is there already, and not of a fine-tune that can be resumed: pass another --out"
        )
    return found


def _start(dense: nn.Module, given: Plan | Path, data: Data, device: torch.device, watch: Watcher) -> Start:
    """Return what a fine-tune of a plan or a file begins with."""
    if isinstance(given, Path) and holds_weights(given):
        plan = stored_plan(given)
        content = fingerprint_weights(load_compressed(dense, given, plan))
        return Start(plan, content, lambda: load_compressed(dense, given, plan))
    plan = given if isinstance(given, Plan) else load_plan(given)
    return Start(plan, APPLIED, lambda: apply_plan(dense, plan, data, device=device, watch=watch))
