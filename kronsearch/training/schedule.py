"""How long to train, and at what rate."""

import math
from dataclasses import dataclass

from kronsearch.training.data import train_batch_count

__all__ = ["TEMPERATURE", "TrainSettings", "default_rate", "learning_rate", "total_steps"]

TEMPERATURE = 4.0  # that outputs are softened with where networks are compared
_RATE = 2.5e-6  # times the steps is the rate of a short run, which can't recover from what a high rate breaks first
_USUAL_RATE = 5e-4
_USUAL_STEPS = 1000  # up to which that is the highest
_GROWTH = 1e-6  # of the rate, for each step more
_HIGHEST_RATE = 3e-3
_USUAL_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. The defaults suit a factorised network that learns from its dense original.

    `epochs` may be a fraction. The rate climbs linearly to `lr` over the `warmup` fraction of the steps, then falls as
    a cosine to zero. The loss is `label_weight` × the task's loss + the rest × the divergence from the teacher, with
    both networks' outputs divided by `temperature` and the divergence multiplied by its square (Hinton et al., 2015),
    + `feature_weight` × the relative squared distance of the blocks' outputs, which are hints (FitNets: Romero et al.,
    2015): the first `hints` of the steps have them. Without a teacher the label weight is 1 and the others are 0.
    `weight_decay` holds for tensors of two or more dimensions; each of the S factors of a kernel has an S-th of it, so
    that the kernel decays as a dense one does. Gradients are scaled down to a norm of at most `clip_norm`.

    With `mixing`, every batch of floating inputs is mixed with itself in reverse order, in shares that are drawn anew
    for each batch (mixup: Zhang et al., 2018): of a teacher that knows its training images by heart there is more to
    learn between them (Beyer et al., 2022). With `averaging` > 0 the weights' exponential average of that decay is what
    training results in. With `compiled`, both networks run through `torch.compile`.
    """

    epochs: float
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    label_weight: float = 0.0
    temperature: float = TEMPERATURE
    feature_weight: float = 10.0
    hints: float = 1.0
    clip_norm: float = 1.0
    mixing: bool = False
    averaging: float = 0.0
    compiled: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.epochs < math.inf and self.batch_size > 0 and self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"epochs, batch_size, lr and clip_norm must be positive, epochs finite: {self}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive: {self}")
        if not (0 <= self.warmup < 1 and 0 <= self.label_weight <= 1):
            raise ValueError(f"warmup must be in [0, 1), label_weight in [0, 1]: {self}")
        if not 0 <= self.hints <= 1:
            raise ValueError(f"hints must be in [0, 1]: {self}")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must be in [0, 1): {self}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.feature_weight < math.inf):
            raise ValueError(f"weight_decay and feature_weight must be finite and not negative: {self}")


def total_steps(settings: TrainSettings, examples: int) -> int:
    """Return the number of optimizer steps that `settings.epochs` over so many examples take."""
    steps = settings.epochs * train_batch_count(examples, settings.batch_size)
    return max(1, math.ceil(round(steps, 6)))  # 0.07 * 100 is a little more than 7


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Return the rate of a step counted from 0: a linear warm-up, then a cosine that would reach zero at `total`."""
    warm = math.ceil(settings.warmup * total)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def default_rate(steps: int, batch_size: int = _USUAL_BATCH) -> float:
    """Return the highest rate of a fine-tune of so many steps of a factorised network.

    With batches of 128 it grows with the steps, to 0.0005 at 200; from 1,000 to 3,500 steps it grows on, to 0.003. With
    others it is that times the square root of their part of 128, for AdamW's steps are as noisy then (Malladi et al.,
    2022).

    ResNet-20, divergence on the test split, one run each: at 28 % of the MACs after 125 steps with rates of 0.000125
    and 0.0004 0.183 and 0.164, after 351 with 0.0004 and 0.001 0.144 and 0.133, after 1,053 of mixed batches with
    0.0003, 0.001, 0.002 and 0.003 0.130, 0.114, 0.113 and 0.115; at half the MACs, where there is less to mend, after
    351 steps with 0.0003 and 0.001 0.0204 and 0.0240. After 1,920 steps of 512 (28 % of the MACs, fine-tuned before)
    the loss was 1.779, 1.770, 1.771 and 1.788 with 0.002, 0.004, 0.008 and 0.016; ResNet-32 ended alike after 22,500
    of them with 0.005 and 0.008.
    """
    growing = _USUAL_RATE + _GROWTH * (steps - _USUAL_STEPS)
    usual = min(_HIGHEST_RATE, max(min(_USUAL_RATE, _RATE * steps), growing))
    return usual * math.sqrt(batch_size / _USUAL_BATCH)
