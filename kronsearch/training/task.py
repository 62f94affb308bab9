"""What a network is trained for: its loss, its metric, and how far two networks' outputs are from each other."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from kronsearch.errors import DataError

__all__ = ["Classification", "Task"]


class Task(ABC):
    """A loss, a metric and a divergence, all of a batch of outputs whose first dimension is the example.

    The law: `divergence` is never negative, and zero if and only if student and teacher say the same. `loss` and
    `divergence` are differentiable in the outputs and are means over the batch, so that a mean over batches of
    one size is the mean over examples.
    """

    name: str
    metric_name: str
    higher_is_better: bool

    @property
    def identity(self) -> str:
        """What it is called and measures: figures of another task aren't compared with its own."""
        better = "higher" if self.higher_is_better else "lower"
        return f"{type(self).__qualname__} {self.name}, {self.metric_name}, {better} is better"

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the batch against its labels, a scalar."""

    @abstractmethod
    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the metric summed over the examples of the batch (the metric itself is sum / examples)."""

    @abstractmethod
    def divergence(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Return how far the outputs are from the teacher's, averaged over the batch, a scalar ≥ 0."""


class Classification(Task):
    """One label per example: cross-entropy, top-1 accuracy, and KL(teacher ‖ student) of the softmax in nats.

    Outputs are logits of shape (examples, classes), targets int64 of shape (examples,), from 0 on; others are a
    DataError. With `classes` given, so is a network with another number of outputs, instead of a wrong figure.
    """

    name = "classification"
    metric_name = "accuracy"
    higher_is_better = True

    def __init__(self, classes: int | None = None) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats; DataError if the network has another number of classes."""
        logits = self._logits(outputs)
        _check_labels(targets, logits, look=targets.device.type == "cpu")  # to look would wait for another device
        return F.cross_entropy(logits, targets)

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the number of examples whose largest logit is the label's."""
        logits = self._logits(outputs)
        _check_labels(targets, logits, look=True)
        return float((logits.argmax(dim=1) == targets).sum().item())

    def divergence(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Return the mean KL divergence of the student's class probabilities from the teacher's, in nats."""
        student = F.log_softmax(self._logits(outputs), dim=1)
        teacher = F.log_softmax(self._logits(teacher_outputs), dim=1)
        # Equal distributions can come out at -1e-9 by rounding.
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True).clamp_min(0)

    def _logits(self, outputs: Tensor) -> Tensor:
        if outputs.dim() != 2 or (self.classes is not None and outputs.shape[1] != self.classes):
            wanted = "any number of classes" if self.classes is None else f"{self.classes} classes"
            raise DataError(
                f"the network's outputs have shape {tuple(outputs.shape)}, classification needs (examples, {wanted}): "
                "use a network made for these classes, or the data it was trained for"
            )
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _check_labels(targets: Tensor, logits: Tensor, *, look: bool) -> None:
    """Raise DataError unless these can be the labels of the logits, and if `look` are."""
    examples, classes = logits.shape
    if targets.dtype != torch.int64 or targets.shape != (examples,):
        raise DataError(
            f"the labels of {examples} examples are {targets.dtype} of shape {tuple(targets.shape)}, classification "
            f"needs torch.int64 of shape ({examples},): give each example the number of its class, from 0 on"
        )
    if look and examples:
        low, high = (int(label) for label in targets.aminmax())
        if low < 0 or high >= classes:
            raise DataError(
                f"there are labels from {low} to {high}, the network tells {classes} classes apart: number them from 0 "
                f"to {classes - 1}, or use a network made for these classes"
            )
