"""A training step of a compressed network against one of the dense network, as fine-tuning runs them, in turns.

    python results/execution-speed/training_step.py [--plan PLAN --model MODEL] [--batch 128] [--pairs 30] [--threads 1]

bf16 autocast where the processor has it (`--float32` without), channels_last images, no teacher: forward and backward
pass, clipping, AdamW. The compressed network runs twice: with all of its kernels formed, and as it is trained, with
some layers in stages where that is expected to be faster. By default the plan is that of
results/cifar10-resnet32-50flops. It is applied without data; images and, of torchvision's networks, weights are random.
Times are CPU seconds of the process with one thread, else those of the clock.
"""

import argparse
import copy
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import kronsearch as ks
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.sekron.spec import Run
from kronsearch.training.optimizer import FactorAdamW
from kronsearch.training.precision import KERNELS, Precision, forward, precision_for
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.stages import training_runs

PLAN = Path(__file__).parents[1] / "cifar10-resnet32-50flops" / "plan.json"
PARTS = ("forward", "backward", "clip", "step")


class Trained:
    """A network and its optimiser; `step` returns the seconds of each part."""

    def __init__(self, model: nn.Module, precision: Precision, runs: dict[str, Run], threads: int) -> None:
        self.model, self.settings = model.train(), TrainSettings(epochs=1)
        self.precision, self.runs = precision, runs
        self.optimizer = FactorAdamW(
            model,
            weight_decay=self.settings.weight_decay,
            highest_rate=self.settings.lr,
            device=torch.device("cpu"),
        )
        self.now = time.process_time if threads == 1 else time.perf_counter

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
        times = [self.now()]
        with kernels_formed(self.model, KERNELS[self.precision], self.runs):
            outputs = forward(self.model, images, self.precision)
        loss = nn.functional.cross_entropy(outputs, labels)
        times.append(self.now())
        loss.backward()
        times.append(self.now())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        times.append(self.now())
        self.optimizer.step(self.settings.lr)
        times.append(self.now())
        return [after - before for before, after in pairwise(times)]


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    precision: Precision = "float32" if options.float32 else precision_for("cpu")
    plan, dense = ks.load_plan(options.plan), ks.load_model(options.model)
    small = ks.apply_plan(dense, plan)
    images, labels = torch.randn(options.batch, *plan.input_shape), torch.randint(10, (options.batch,))
    runs = training_runs(small, images, options.batch, precision)
    print(f"{precision}: {len(runs)} of {len(plan.replaced)} layers are trained in stages")
    networks = {
        "dense": Trained(dense, precision, {}, options.threads),
        "formed": Trained(copy.deepcopy(small), precision, {}, options.threads),
        "compressed": Trained(small, precision, runs, options.threads),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in networks}
    for turn in range(options.pairs + 3):
        for name, network in networks.items():
            parts = network.step(images, labels)
            if turn >= 3:
                times[name].append(parts)
    whole = {name: [sum(parts) for parts in own] for name, own in times.items()}
    for name, own in times.items():
        columns = list(zip(*own, strict=True))
        parts = ", ".join(f"{part} {1e3 * statistics.median(t):.1f}" for part, t in zip(PARTS, columns, strict=True))
        print(f"{name}: {1e3 * statistics.median(whole[name]):.1f} ms ({parts})")
    for name in ("formed", "compressed"):
        ratio = statistics.median(whole[name]) / statistics.median(whole["dense"])
        within = statistics.quantiles((b / a for a, b in zip(whole["dense"], whole[name], strict=True)), n=4)
        print(
            f"{name}: ratio of medians {ratio:.3f}; within pairs {within[1]:.3f} ({within[0]:.3f} to {within[2]:.3f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--model", default="zoo:cifar_resnet32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true")
    main(parser.parse_args())
