"""The training loop: AdamW under a cosine, from labels and a teacher's outputs, watched and stopped from outside."""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.blocks import feature_distance, recorded_outputs
from kronsearch.training.data import Data, endless_train_batches, train_batch_count
from kronsearch.training.precision import Precision, eval_mode, forward, precision_for
from kronsearch.training.task import Task

__all__ = ["StepReport", "TrainSettings", "finetune", "finetune_steps", "learning_rate", "total_steps"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. The defaults suit a factorised network that learns from its dense original.

    `epochs` may be a fraction. The rate climbs linearly to `lr` over the `warmup` fraction of the steps, then falls as
    a cosine to zero. The loss is `label_weight` × the task's loss + the rest × the divergence from the teacher, with
    both networks' outputs divided by `temperature` and the divergence multiplied by its square (Hinton et al., 2015),
    + `feature_weight` × the relative squared distance of the blocks' outputs (FitNets: Romero et al., 2015); without a
    teacher the label weight is 1 and the others are 0. `weight_decay` holds for tensors of two or more dimensions.
    Gradients are scaled down to a norm of at most `clip_norm`.
    """

    epochs: float
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    label_weight: float = 0.0
    temperature: float = 4.0
    feature_weight: float = 10.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.epochs < math.inf and self.batch_size > 0 and self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"epochs, batch_size, lr and clip_norm must be positive, epochs finite: {self}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive: {self}")
        if not (0 <= self.warmup < 1 and 0 <= self.label_weight <= 1):
            raise ValueError(f"warmup must be in [0, 1), label_weight in [0, 1]: {self}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.feature_weight < math.inf):
            raise ValueError(f"weight_decay and feature_weight must be finite and not negative: {self}")


@dataclass(frozen=True)
class StepReport:
    """Where the training stands. `loss` is the mean since the report before (not finite: training has diverged)."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    images_per_second: float


def total_steps(settings: TrainSettings, examples: int) -> int:
    """Return the number of optimizer steps that `settings.epochs` over so many examples take."""
    return max(1, math.ceil(settings.epochs * train_batch_count(examples, settings.batch_size)))


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Return the rate of a step counted from 0: a linear warm-up, then a cosine that would reach zero at `total`."""
    warm = math.ceil(settings.warmup * total)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def finetune_steps(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    blocks: Sequence[str] = (),
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    report_every: int | None = None,
) -> Generator[StepReport, None, None]:
    """Train `model` in place and yield a report after every `report_every` steps and after the last.

    Model and teacher must be on `device`. Between reports the caller may use the model as it likes, or stop: closing
    the iterator (or dropping it) leaves the model in eval mode with the weights of the last step and no gradients. The
    teacher is run in eval mode. `blocks` are dotted names of modules that both have, whose outputs the student shall
    come near to. All randomness, that of dropout too, comes from `generator` (a CPU generator): the
    global generators are left as they were. Raises DataError or ModelError from the task and the forward pass.
    """
    device = torch.device(device)
    steps = total_steps(settings, data.size("train"))
    optimizer = _optimizer(model, settings, device)
    precision = precision_for(device)
    watched = tuple(blocks) if settings.feature_weight > 0 and teacher is not None else ()
    batches = endless_train_batches(data, settings.batch_size, generator=generator, device=device)
    reported, examples, loss_sum = 0, 0, torch.zeros((), device=device)
    started = time.perf_counter()
    try:
        model.train()
        for step in range(1, steps + 1):
            rate = learning_rate(settings, step - 1, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = next(batches)
            with _own_randomness(generator, device):
                wanted, wanted_features = _teacher_outputs(teacher, inputs, precision, settings, watched)
                with kernels_formed(model), recorded_outputs(model, watched) as features:
                    outputs = forward(model, inputs, precision)
                loss = _loss(outputs, targets, wanted, data.task, settings)
                if wanted_features:
                    loss = loss + settings.feature_weight * feature_distance(features, wanted_features)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            examples += len(inputs)
            if step == steps or (report_every is not None and step % report_every == 0):
                # .item() waits for the device, so it goes before the clock.
                mean_loss = loss_sum.item() / (step - reported)
                speed = examples / (time.perf_counter() - started)
                yield StepReport(step, steps, mean_loss, rate, speed)
                model.train()
                reported, examples, started = step, 0, time.perf_counter()
                loss_sum.zero_()
    finally:
        batches.close()
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def finetune(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    blocks: Sequence[str] = (),
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> StepReport:
    """Train `model` in place to the end (see `finetune_steps`), leave it in eval mode, and return the one report."""
    (report,) = finetune_steps(
        model, data, settings, teacher=teacher, blocks=blocks, generator=generator, device=device
    )
    return report


def _loss(
    outputs: Tensor, targets: Tensor, teacher_outputs: Tensor | None, task: Task, settings: TrainSettings
) -> Tensor:
    if teacher_outputs is None:
        return task.loss(outputs, targets)
    heat = settings.temperature
    loss = (1 - settings.label_weight) * heat**2 * task.divergence(outputs / heat, teacher_outputs / heat)
    if settings.label_weight > 0:
        loss = loss + settings.label_weight * task.loss(outputs, targets)
    return loss


def _teacher_outputs(
    teacher: nn.Module | None,
    inputs: Tensor,
    precision: Precision,
    settings: TrainSettings,
    blocks: Sequence[str],
) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """Return the teacher's outputs and those of its blocks, where the loss needs either."""
    if teacher is None or (settings.label_weight == 1 and not blocks):
        return None, {}
    with torch.no_grad(), eval_mode(teacher), recorded_outputs(teacher, blocks) as features:
        outputs = forward(teacher, inputs, precision)
    return outputs, features


def _optimizer(model: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
    return torch.optim.AdamW(groups, lr=settings.lr, fused=device.type in ("cpu", "cuda"))


@contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let what draws from the global generators (dropout) draw from a seed of `generator`, and put them back after."""
    seed = int(torch.randint(2**62, (), generator=generator))
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
