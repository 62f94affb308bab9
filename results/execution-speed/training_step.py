"""A training step of ResNet-32 at half the MACs against one of the dense network, as fine-tuning runs them, in turns.

    python results/execution-speed/training_step.py [PAIRS [THREADS]]

Batch 128, bf16 autocast where the processor has it, channels_last images, kernels formed, no teacher: forward and
backward pass, clipping, AdamW. The plan is that of results/cifar10-resnet32-50flops, applied without data; images are
random. Times are CPU seconds of the process with one thread, else those of the clock.
"""

import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import kronsearch as ks
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.optimizer import make_optimizer
from kronsearch.training.precision import KERNELS, forward, precision_for
from kronsearch.training.schedule import TrainSettings

PLAN = Path(__file__).parents[1] / "cifar10-resnet32-50flops" / "plan.json"
PARTS = ("forward", "backward", "clip", "step")


class Trained:
    """A network and its optimiser; `step` returns the seconds of each part."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.model, self.settings = model.train(), TrainSettings(epochs=1)
        self.optimizer = make_optimizer(
            model, lr=self.settings.lr, weight_decay=self.settings.weight_decay, device=torch.device("cpu")
        )
        self.now = time.process_time if threads == 1 else time.perf_counter

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
        times = [self.now()]
        with kernels_formed(self.model, KERNELS[precision_for("cpu")]):
            outputs = forward(self.model, images, precision_for("cpu"))
        loss = nn.functional.cross_entropy(outputs, labels)
        times.append(self.now())
        loss.backward()
        times.append(self.now())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        times.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self.now())
        return [after - before for before, after in pairwise(times)]


def main(pairs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dense = ks.load_model("zoo:cifar_resnet32")
    networks = {
        "dense": Trained(dense, threads),
        "compressed": Trained(ks.apply_plan(dense, ks.load_plan(PLAN)), threads),
    }
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    times: dict[str, list[list[float]]] = {name: [] for name in networks}
    for turn in range(pairs + 3):
        for name, network in networks.items():
            parts = network.step(images, labels)
            if turn >= 3:
                times[name].append(parts)
    whole = {name: statistics.median(map(sum, own)) for name, own in times.items()}
    for name, own in times.items():
        columns = list(zip(*own, strict=True))
        parts = ", ".join(f"{part} {1e3 * statistics.median(t):.1f}" for part, t in zip(PARTS, columns, strict=True))
        print(f"{name}: {1e3 * whole[name]:.1f} ms ({parts})")
    within = statistics.quantiles((sum(b) / sum(a) for a, b in zip(*times.values(), strict=True)), n=4)
    print(f"ratio of medians {whole['compressed'] / whole['dense']:.3f}; within pairs, quartiles {within}")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(30, 1)[len(given) :])
