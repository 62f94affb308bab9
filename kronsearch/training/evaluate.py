"""What a network is worth on a split: metric, loss, and divergence from its teacher."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronsearch.errors import DataError
from kronsearch.training.data import Batch, Data, Split
from kronsearch.training.distillation import softened_divergence
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import Precision, eval_mode, forward

__all__ = ["Evaluation", "evaluate", "outputs", "within_error"]


def within_error(gap: float, *errors: float) -> bool:
    """Tell whether two scores this far apart are alike: no farther than the standard error of their difference.

    Args:
        gap: the difference of the scores.
        errors: the standard error of each: both count, for that of a score without a fault is zero.
    """
    return abs(gap) <= math.hypot(*errors) * (1 + 1e-9)


@dataclass(frozen=True)
class Evaluation:
    """Means over `n` examples: the task's metric, its loss, and the divergence if a teacher's outputs were given.

    `error` is the metric's standard error, from how it differs between batches; 0 where there was but one.
    """

    metric: float
    loss: float
    divergence: float | None
    n: int
    error: float = 0.0


def evaluate(
    model: nn.Module,
    data: Data,
    split: Split,
    *,
    teacher_outputs: Tensor | None = None,
    temperature: float = 1.0,
    limit: int | None = None,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> Evaluation:
    """Evaluate the model (on `device`) on a split, or on a fixed random subset of `limit` examples of it.

    `teacher_outputs` are what `outputs` returns for the teacher with the same split and limit; how far the model's are
    from them is told at the `temperature`, see `softened_divergence`. The model's modules are
    put back in the modes they were in. Raises ValueError if `teacher_outputs` are of another number of examples, and
    what the task and the forward pass raise.
    """
    taken = data.size(split) if limit is None else min(limit, data.size(split))
    if teacher_outputs is not None and len(teacher_outputs) != taken:
        raise ValueError(f"{len(teacher_outputs)} teacher outputs for {taken} examples: use the same split and limit")
    task = data.task
    loss = divergence = 0.0
    metrics: list[tuple[float, int]] = []
    n = 0
    # Not inference mode: what a model caches in it could never again take part in a backward pass.
    with freed_memory_kept(device), torch.no_grad(), eval_mode(model):
        for inputs, targets in _batches(data, split, batch_size, limit, device):
            result = forward(model, inputs, precision)
            count = len(inputs)
            metrics.append((task.metric_sum(result, targets), count))
            loss += count * task.loss(result, targets).item()
            if teacher_outputs is not None:
                wanted = teacher_outputs[n : n + count].to(device)
                divergence += count * softened_divergence(result, wanted, task, temperature).item()
            n += count
    metric = sum(total for total, _ in metrics) / n
    squares = sum((total - count * metric) ** 2 for total, count in metrics)
    error = math.sqrt(squares * len(metrics) / (len(metrics) - 1)) / n if len(metrics) > 1 else 0.0
    return Evaluation(metric, loss / n, None if teacher_outputs is None else divergence / n, n, error)


def outputs(
    model: nn.Module,
    data: Data,
    split: Split,
    *,
    limit: int | None = None,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> Tensor:
    """Return the outputs for a split (or the subset that `limit` takes) in its fixed order: on the CPU, float32.

    The model must be on `device`; its modules are put back in the modes they were in. Raises DataError if the split
    hasn't as many examples as it says, or the outputs are of other sizes from batch to batch.
    """
    with freed_memory_kept(device), torch.no_grad(), eval_mode(model):
        parts = [
            forward(model, inputs, precision).cpu() for inputs, _ in _batches(data, split, batch_size, limit, device)
        ]
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        first, second, *_ = sorted(sizes)
        raise DataError(
            f"for the {split} split the outputs of an example are of shape {first} and of shape {second}, and networks "
            "are compared by outputs of one shape: pad the data, or crop them"
        )
    return torch.cat(parts)


def _batches(
    data: Data, split: Split, batch_size: int, limit: int | None, device: str | torch.device
) -> Iterator[Batch]:
    """Yield the batches of a split; DataError at the end if they have not as many examples as they should."""
    seen, size = 0, data.size(split)
    wanted = size if limit is None else min(limit, size)
    for batch in data.batches(split, batch_size, limit=limit, device=device):
        yield batch
        seen += len(batch[0])
    if seen != wanted or not seen:
        raise DataError(
            f"the {split} split of data {data.spec!r} gave {seen} examples where {wanted} were asked for: its `size` "
            "and its `batches` must agree, and it needs one at least"
        )
