"""The training loop: AdamW under a cosine, from labels and a teacher's outputs, watched and stopped from outside."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import kernels_formed
from kronsearch.sekron.spec import Run
from kronsearch.training.averaging import Average
from kronsearch.training.batches import Batches
from kronsearch.training.blocks import Watched, feature_distance
from kronsearch.training.data import Data, to_device
from kronsearch.training.distillation import Labels, training_loss
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.optimizer import FactorAdamW
from kronsearch.training.precision import KERNELS, compiling, forward_watched, precision_for, shield_gradients
from kronsearch.training.randomness import own_randomness
from kronsearch.training.replay import Replay
from kronsearch.training.schedule import TrainSettings, learning_rate, total_steps
from kronsearch.training.stages import training_runs
from kronsearch.training.teacher import Teacher
from kronsearch.training.team import ALONE, Team

__all__ = ["StepReport", "Trainer", "finetune", "trainable"]


@dataclass(frozen=True)
class StepReport:
    """Where the training stands. `loss` is the mean since the report before (not finite: training has diverged)."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    images_per_second: float


class Trainer:
    """A training of a network in place that goes on step by step, and can be stopped and gone on with exactly.

    Model and teacher must be on `device`. All randomness, that of dropout too, comes from `generator` (a CPU generator
    that nothing else draws from): the global generators are left as they were. At the end `close` it: until then freed
    memory is kept. On CUDA, one process records its step and plays it back (see `Replay`).

    Args:
        model: to train, with its trainable parameters.
        data: whose training split.
        settings: how.
        teacher: of which a copy runs in eval mode; None for labels alone.
        blocks: dotted names of modules that both networks have, whose outputs the student shall come near to.
        generator: of everything random.
        device: to run on.
        team: the processes that train together, each of which has a trainer made alike.

    Raises:
        AttributeError: a network has not all of the blocks.
        TrainingError: several processes are to train compiled networks.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainSettings,
        *,
        teacher: nn.Module | None = None,
        blocks: Sequence[str] = (),
        generator: torch.Generator,
        device: str | torch.device = "cpu",
        team: Team = ALONE,
    ) -> None:
        if settings.compiled:
            team.refuse_compiling()
        self.model, self.settings = model, settings
        self.step, self.total_steps = 0, total_steps(settings, data.size("train"))
        self._device, self._team = torch.device(device), team
        self._task = data.task
        self._precision = precision_for(device)
        self._optimizer = FactorAdamW(
            model, weight_decay=settings.weight_decay, highest_rate=settings.lr, device=self._device
        )
        self._batches = Batches(data, settings.batch_size, generator=generator, device=device)
        self._average = Average(model, settings.averaging) if settings.averaging > 0 else None
        self._blocks = tuple(blocks) if settings.feature_weight > 0 and teacher is not None else ()
        self._hinted = math.ceil(round(settings.hints * self.total_steps, 6))  # steps
        self._learnt_from = teacher if self._blocks or settings.label_weight < 1 else None
        if self._learnt_from is not None:
            for name in self._blocks:  # before there are hooks
                self._learnt_from.get_submodule(name)
        self._watched = Watched(team.wrapped(model, self._device), self._blocks, model)
        self._shields = shield_gradients(model, self._precision, self._device)
        self._runner: nn.Module = self._watched
        if settings.compiled:
            self._runner = torch.compile(self._watched)  # type: ignore[assignment]
        # both made with the first batch
        self._teacher: Teacher | None = None
        self._runs: dict[str, Run] | None = None
        self._memory = ExitStack()
        self._memory.enter_context(freed_memory_kept(self._device))
        self._stream: torch.cuda.Stream | None = None
        self._replay: Replay | None = None
        if self._device.type == "cuda" and team.size == 1:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._replay = Replay(self._learn, model, model.zero_grad)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> nn.Module:
        """The network as training leaves it at this step: the average where there is one, else the model."""
        return self.model if self._average is None else self._average.model

    @property
    def refusal(self) -> str | None:
        """Why the step is not played back, in a few words; None if it is, or may be yet, or there is no CUDA."""
        return None if self._replay is None else self._replay.refusal

    def close(self) -> None:
        """Leave the model in eval mode, with the weights of the last step and no gradients."""
        self._memory.close()
        self._replay = None  # which refers to the trainer: else its memory is kept until garbage is collected
        self._batches.close()
        self._watched.close()
        for shield in self._shields:
            shield.remove()
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def advance(self, steps: int) -> StepReport:
        """Train for so many steps, or as many as there are left, and report.

        Raises DataError or ModelError from the task and the forward pass, TrainingError if networks can't be compiled.
        """
        last = min(self.step + steps, self.total_steps)
        if self._stream is None:
            return self._advance(last)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                return self._advance(last)
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _advance(self, last: int) -> StepReport:
        examples, begun, loss_sum = 0, self.step, torch.zeros((), device=self._device)
        rate = 0.0
        started = time.perf_counter()
        self.model.train()
        while self.step < last:
            rate = learning_rate(self.settings, self.step, self.total_steps)
            (inputs, targets), seed = self._batches.take()
            examples += len(inputs)
            if self._runs is None:
                self._prepare(inputs)
            if self.step == self._hinted and self._replay is not None:
                self._replay.forget()  # steps are others from here on
            self._optimizer.prepare(rate)
            with own_randomness(seed + self._team.rank, self._device):
                loss_sum += (self._replay or self._learn)(inputs, targets, self._share(inputs, seed))
            self.step += 1
            if self._average is not None:
                self._average.update(self.step)
        # .item() waits for the device, so it goes before the clock.
        mean_loss = self._team.average(loss_sum).item() / max(1, last - begun)
        speed = examples / (time.perf_counter() - started)
        return StepReport(self.step, self.total_steps, mean_loss, rate, speed)

    def _share(self, inputs: Tensor, seed: int) -> Tensor:
        """Return how much of each input a batch keeps where it is mixed with itself in reverse order, a scalar."""
        if not self._is_mixed(inputs):
            return inputs.new_ones(())
        return to_device(torch.rand((), generator=torch.Generator().manual_seed(seed)), inputs.device)

    def _is_mixed(self, inputs: Tensor) -> bool:
        return self.settings.mixing and inputs.is_floating_point()

    def _learn(self, inputs: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """Take the step that the optimizer is prepared for, by work on the device alone, and return the loss."""
        labels: Labels = [(1.0, targets)]
        if self._is_mixed(inputs):
            inputs = torch.lerp(inputs.flip(0), inputs, share.to(inputs.dtype))
            labels = [(share, targets), (1 - share, targets.flip(0))]
        own, part = self._team.share(len(inputs))
        loss = part * self._loss(inputs[own], [(share, told[own]) for share, told in labels])
        with compiling():
            self._team.differentiate(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._optimizer.move()
        return loss.detach()

    def _prepare(self, inputs: Tensor) -> None:
        """Make what depends on how a batch looks."""
        share = -(-len(inputs) // self._team.size)
        self._runs = training_runs(self.model, inputs, share, self._precision)
        if self._learnt_from is not None:
            compiled = self.settings.compiled
            self._teacher = Teacher(
                self._learnt_from, self._blocks, inputs, precision=self._precision, compiled=compiled
            )

    def _loss(self, inputs: Tensor, labels: Labels) -> Tensor:
        wanted, theirs = (None, {}) if self._teacher is None else self._teacher(inputs)
        with kernels_formed(self.model, KERNELS[self._precision], self._runs):
            outputs, ours = forward_watched(self._runner, inputs, self._precision, self.model)
        loss = training_loss(outputs, labels, wanted, self._task, self.settings)
        if self._blocks and self.step < self._hinted:
            loss = loss + self.settings.feature_weight * feature_distance(ours, theirs)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return all that the training needs to go on from here, by name; the tensors are the trainer's own."""
        start, taken = self._batches.place()
        return {
            "generator": start,
            "place": torch.tensor([self.step, taken]),
            **_named("model/", self.model.state_dict()),
            **_named("optimizer/", self._optimizer.state()),
            **({} if self._average is None else _named("average/", self._average.model.state_dict())),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go to where a trainer that was made alike stood when it gave its state; the steps that follow are the same.

        Raises ValueError or RuntimeError where the state is of another network, or malformed.
        """
        own = self.state()
        for name in sorted(own.keys() | state.keys()):
            found, wanted = (_look(tensors.get(name)) for tensors in (state, own))
            if found != wanted:
                raise ValueError(f"{name} is {found} and should be {wanted}")
        step, taken = state["place"].tolist()
        if not 0 <= taken <= step <= self.total_steps or step != state["optimizer//taken"]:
            raise ValueError(f"step {step} of {self.total_steps}, {taken} of it in its epoch, is no place")
        self.model.load_state_dict(_part(state, "model/"))
        if self._average is not None:
            self._average.model.load_state_dict(_part(state, "average/"))
        self._optimizer.restore(_part(state, "optimizer/"))
        if self._replay is not None:
            self._replay.forget()
        self.step = step
        self._batches.go_to(state["generator"], taken)


def _look(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def trainable(model: nn.Module) -> nn.Module:
    """Return a model whose parameters all take gradients, frozen before or not; integers can't."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


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
    """Train `model` in place to the end (see `Trainer`), leave it in eval mode, and return the one report."""
    with Trainer(model, data, settings, teacher=teacher, blocks=blocks, generator=generator, device=device) as trainer:
        return trainer.advance(trainer.total_steps)
