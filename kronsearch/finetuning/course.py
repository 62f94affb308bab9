"""The course of one fine-tune: it begins, or goes on where an earlier process left it, and runs to its end."""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from kronsearch.errors import CheckpointError, TrainingError, first_line
from kronsearch.files import make_folder
from kronsearch.finetuning.loop import CHECKPOINT, COMPRESSED, Loop, Tell
from kronsearch.finetuning.record import Record, read_record
from kronsearch.finetuning.validation import Validation
from kronsearch.models.apply import measured, skeleton
from kronsearch.models.checkpoint import fill, fingerprint_weights, load_state_dict
from kronsearch.models.structure import fingerprint_structure
from kronsearch.plan import Plan
from kronsearch.training.blocks import block_names
from kronsearch.training.data import Data
from kronsearch.training.finetune import Trainer, trainable
from kronsearch.training.precision import require_compiler
from kronsearch.training.schedule import TrainSettings, default_rate, total_steps
from kronsearch.training.streams import Purpose, stream
from kronsearch.training.team import ALONE, Team

__all__ = ["APPLIED", "Course", "Ended", "Found", "Start", "long_settings", "new_trainer"]

APPLIED = "applied"  # the content of a start that is the plan applied to the dense network with the data
_AVERAGING = 0.998  # decay of the average of weights
_LONG = 3_000  # steps: as many have batches mixed, and as many of a longer run have hints

Found = tuple[Record, dict[str, Tensor]]


@dataclass(frozen=True)
class Start:
    """What a fine-tune begins with.

    Args:
        plan: of the network.
        content: tells apart all else that the network depends on, besides the plan, the dense one and the data.
        build: makes the network.
    """

    plan: Plan
    content: str
    build: Callable[[], nn.Module]

    @property
    def digest(self) -> str:
        """A digest of the plan and the content; what a plan was timed at, or scored before, is of no account."""
        plan = self.plan.model_copy(update={"latency": None, "score": None})
        return hashlib.sha256(f"{plan.model_dump_json()} {self.content}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ended:
    """What a course came to.

    Args:
        plan: of the network, with its cost.
        network: the one that was kept, see `supersedes`.
        record: of all evaluations.
        was_done: whether an earlier call had come to the end.
        seconds: that this call trained for, evaluations included.
    """

    plan: Plan
    network: nn.Module
    record: Record
    was_done: bool
    seconds: float


class Course:
    """One fine-tune in a folder of its own, as one of its processes sees it.

    Args:
        dense: the teacher, on `device` and in eval mode.
        start: what it begins with.
        data: to train on.
        settings: how.
        out: the folder.
        device: to run on.
        seed: of everything random.
        team: the processes that train together.
    """

    def __init__(
        self,
        dense: nn.Module,
        start: Start,
        data: Data,
        settings: TrainSettings,
        *,
        out: Path,
        device: torch.device | str,
        seed: int,
        team: Team = ALONE,
    ) -> None:
        self._dense, self._start, self._data, self._settings = dense, start, data, settings
        self._out, self._device, self._seed, self._team = out, device, seed, team
        self.identity: dict[str, JsonValue] = {
            "structure": fingerprint_structure(dense)[:16],
            "weights": fingerprint_weights(dense)[:16],
            "network": start.digest,
            "data": data.fingerprint[:16],
            "task": data.task.identity,
            "epochs": settings.epochs,
            "lr": settings.lr,
            "batch size": settings.batch_size,
            "label weight": settings.label_weight,
            **({"hints": settings.hints} if settings.hints < 1 else {}),  # there were none once
            "compiled": settings.compiled,
            "seed": seed,
        }

    def check_compiling(self) -> None:
        """Raise TrainingError if the networks shall be compiled, and can't be."""
        if self._settings.compiled:
            self._team.refuse_compiling()
            require_compiler(self._device)

    def found(self) -> Found | None:
        """Return what there is in the folder to resume from; not one with other settings that has not taken a step.

        Raises:
            CheckpointError: it is of another kind, malformed, or not all there.
            TrainingError: it is of another fine-tune.
        """
        found = read_record(self._out / CHECKPOINT)
        if found is not None and not found[0].begun and found[0].identity != self.identity:
            return None
        if found is not None:
            found[0].check(self.identity, self._out / CHECKPOINT)
            if found[0].kept is not None and not (self._out / COMPRESSED).is_file():
                raise CheckpointError(
                    f"{self._out / CHECKPOINT} can't be resumed from without {COMPRESSED} beside it: pass another --out"
                )
        return found

    def run(self, found: Found | None, validation: Validation | None, tell: Tell) -> Ended:
        """Begin, or resume from what was found, and train to the end.

        Args:
            found: what `found` returned.
            validation: of the data; None makes one where it is needed.
            tell: see `Loop`.

        Raises:
            CheckpointError: what was found, or the network that was kept, is another one.
            TrainingError: the loss is no longer finite, or the networks can't be compiled.
        """
        steps = total_steps(self._settings, self._data.size("train"))
        was_done = found is not None and any(row.step == steps for row in found[0].log)
        if not was_done:
            self.check_compiling()
        if self._team.leads:
            make_folder(self._out)
        if found is None:
            small, record, state = self._start.build(), Record(identity=self.identity), None
        else:
            small, (record, state) = skeleton(self._dense, self._start.plan), found
        small = trainable(small.to(self._device))  # frozen or not in the dense network
        plan = measured(self._start.plan, self._dense, small)
        with new_trainer(
            self._dense,
            small,
            self._start.plan.replaced,
            self._data,
            self._settings,
            seed=self._seed,
            device=self._device,
            team=self._team,
        ) as trainer:
            if state is not None:
                self._restore(trainer, state)
            began = time.monotonic()
            if not was_done:
                record = Loop(
                    trainer,
                    record,
                    validation=validation or Validation(self._dense, self._data, self._device),
                    plan=plan,
                    out=self._out if self._team.leads else None,
                    tell=tell,
                ).run()
            seconds = time.monotonic() - began
        kept = self._out / COMPRESSED
        weights = self._team.from_leader(load_state_dict(kept) if self._team.leads else {})
        fill(small, weights, f"{kept} is not what this fine-tune left there, pass another --out")
        return Ended(plan, small, record, was_done, seconds)

    def _restore(self, trainer: Trainer, state: dict[str, Tensor]) -> None:
        try:
            trainer.restore(state)
        except (ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{self._out / CHECKPOINT} can't be resumed from ({reason}): pass another --out"
            ) from error


def new_trainer(
    dense: nn.Module,
    small: nn.Module,
    replaced: Iterable[str],
    data: Data,
    settings: TrainSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> Trainer:
    """Return what fine-tunes a compressed network, whose replaced layers have these names, with its dense one."""
    return Trainer(
        small,
        data,
        settings,
        teacher=dense,
        blocks=block_names(replaced),
        generator=stream(seed, Purpose.BATCHES),
        device=device,
        team=team,
    )


def long_settings(
    data: Data,
    *,
    epochs: float,
    lr: float | None = None,
    batch_size: int = 128,
    label_weight: float = 0.0,
    compiled: bool = False,
) -> TrainSettings:
    """Return how a fine-tune of so many epochs trains.

    Batches are mixed in long runs only. Divergence from the dense network on the test split, one run each: ResNet-32 at
    a fifth of the params after 3,159 steps 0.128 with and 0.139 without, ResNet-20 at half the MACs after 702 steps
    0.032 with and 0.024 without.

    The first 3,000 steps have the outputs of blocks as hints. Once the student has come so far they are in its way:
    ResNet-20 at 28 % of the MACs, fine-tuned for 396 epochs before, came in three more (288 steps of 512, mixed, rate
    0.006) from 91.49 to 91.48 % with them and to 91.62 % without, with cross-entropies of 0.332 and 0.327 (test images
    and their mirror images, one run each). From where on that is so was not measured.

    Raises:
        TrainingError: they make no sense.
    """
    try:
        settings = TrainSettings(epochs=epochs, batch_size=batch_size, label_weight=label_weight, compiled=compiled)
        steps = total_steps(settings, data.size("train"))
        rate = lr or default_rate(steps, min(batch_size, data.size("train")))
        return replace(settings, lr=rate, mixing=steps >= _LONG, hints=min(1.0, _LONG / steps), averaging=_AVERAGING)
    except ValueError as error:
        raise TrainingError(str(error)) from error
