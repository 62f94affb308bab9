"""What a student is trained for: labels, and its teacher's outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronsearch.training.schedule import TrainSettings
from kronsearch.training.task import Task

__all__ = ["Labels", "softened_divergence", "training_loss"]

Labels = Sequence[tuple[float | Tensor, Tensor]]
"""Targets of a batch with the part of each input that they hold for; the parts add up to 1."""


def training_loss(
    outputs: Tensor, labels: Labels, wanted: Tensor | None, task: Task, settings: TrainSettings
) -> Tensor:
    """Return the loss of a batch without that of the blocks; the task's own where no teacher (None) counts."""
    if wanted is None or settings.label_weight == 1:
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
