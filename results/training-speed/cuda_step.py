"""Milliseconds of a training step on a GPU, played back or not.

python cuda_step.py COMPRESSED WEIGHTS STEPS [eager] [compiled]: of a compressed network that has the weights as its
teacher, on random images of CIFAR-10's size, in three parts; and what of it is not the device's.
"""

import sys
import time
from collections.abc import Callable

import torch

import kronsearch as ks
from kronsearch.finetuning.course import long_settings, new_trainer
from kronsearch.models.apply import load_compressed, stored_plan
from kronsearch.training.data import TensorData
from kronsearch.training.finetune import Trainer
from kronsearch.training.task import Classification


def random_data() -> TensorData:
    """Return images of noise with labels at random, augmented as CIFAR-10's."""
    seeded, splits = torch.Generator().manual_seed(0), {}
    for split, count in (("train", 12_800), ("val", 500), ("test", 500)):
        images = torch.randint(256, (count, 3, 32, 32), generator=seeded).to(torch.uint8)
        splits[split] = images, torch.randint(10, (count,), generator=seeded)
    task, half = Classification(10), (0.5, 0.5, 0.5)
    return TensorData(splits, spec="random", seed=0, task=task, mean=half, std=half, pad=4, flip=True)


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Return how long it takes, on the average."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1e3


def tell(trainer: Trainer, steps: int) -> None:
    """Print what a step takes, and what its parts do."""
    began = time.perf_counter()
    trainer.advance(10)
    print(f"the first ten steps {time.perf_counter() - began:.1f} s")
    for _ in range(3):
        print(f"a step {milliseconds(lambda: trainer.advance(steps // 3), 1) / (steps // 3):.2f} ms", flush=True)
    with torch.cuda.stream(trainer._stream):
        print(f"a batch {milliseconds(trainer._batches.take, 100):.2f} ms")
        print(f"the average {milliseconds(lambda: trainer._average.update(1000), 100):.2f} ms")
        if trainer._replay is not None and trainer._replay.is_recorded:
            print(f"the recorded part {milliseconds(trainer._replay._graph.replay, 100):.2f} ms")
    print(f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def main(file: str, weights: str, steps: str, *how: str) -> None:
    """Train for so many steps."""
    plan = stored_plan(file)
    dense = ks.load_model(plan.model.spec, weights=weights)
    small = load_compressed(dense, file).cuda().requires_grad_()
    data = random_data()
    settings = long_settings(data, epochs=400, label_weight=0.5, compiled="compiled" in how)
    with new_trainer(dense.cuda().eval(), small, plan.replaced, data, settings, device="cuda") as trainer:
        if "eager" in how:
            trainer._replay = None
        tell(trainer, int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
