"""What a student is trained for: labels, its teacher's outputs, and the outputs of the teacher's blocks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronsearch.training.blocks import Recorder
from kronsearch.training.precision import Precision, eval_mode, forward
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.task import Task

__all__ = ["Labels", "softened_divergence", "teacher_outputs", "training_loss"]

Labels = Sequence[tuple[float, Tensor]]
"""Targets of a batch with the part of each input that they hold for; the parts add up to 1."""


def training_loss(
    outputs: Tensor, labels: Labels, wanted: Tensor | None, task: Task, settings: TrainSettings
) -> Tensor:
    """Return the loss of a batch without that of the blocks; the task's own where there is no teacher (None)."""
    if wanted is None:
        return _label_loss(outputs, labels, task)
    loss = (1 - settings.label_weight) * softened_divergence(outputs, wanted, task, settings.temperature)
    if settings.label_weight > 0:
        loss = loss + settings.label_weight * _label_loss(outputs, labels, task)
    return loss


def softened_divergence(outputs: Tensor, wanted: Tensor, task: Task, temperature: float) -> Tensor:
    """Return the divergence of outputs divided by the temperature, times its square (Hinton et al., 2015), a scalar.

    At a temperature of 1 it is the divergence; the higher, the nearer to a squared distance of the outputs, and the
    less a few examples decide that the teacher is sure of.
    """
    return temperature**2 * task.divergence(outputs / temperature, wanted / temperature)


def _label_loss(outputs: Tensor, labels: Labels, task: Task) -> Tensor:
    return torch.stack([share * task.loss(outputs, targets) for share, targets in labels]).sum()


def teacher_outputs(
    teacher: nn.Module | None,
    inputs: Tensor,
    precision: Precision,
    settings: TrainSettings,
    recorder: Recorder | None,
) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """Return the teacher's outputs and those of its blocks that are recorded, where the loss needs either."""
    if teacher is None or (settings.label_weight == 1 and recorder is None):
        return None, {}
    with torch.no_grad(), eval_mode(teacher):
        outputs = forward(teacher, inputs, precision)
    return outputs, {} if recorder is None else recorder.take()
