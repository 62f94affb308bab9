"""What a student is trained for: labels, its teacher's outputs, and the outputs of the teacher's blocks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronsearch.training.blocks import recorded_outputs
from kronsearch.training.precision import Precision, eval_mode, forward
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.task import Task

__all__ = ["teacher_outputs", "training_loss"]


def training_loss(
    outputs: Tensor, targets: Tensor, wanted: Tensor | None, task: Task, settings: TrainSettings
) -> Tensor:
    """Return the loss of a batch without that of the blocks; the task's own where there is no teacher (None)."""
    if wanted is None:
        return task.loss(outputs, targets)
    heat = settings.temperature
    loss = (1 - settings.label_weight) * heat**2 * task.divergence(outputs / heat, wanted / heat)
    if settings.label_weight > 0:
        loss = loss + settings.label_weight * task.loss(outputs, targets)
    return loss


def teacher_outputs(
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
