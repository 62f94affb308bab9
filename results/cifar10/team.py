"""A fine-tune on a GPU that learns what several networks say together of views that are made once.

python team.py COMPRESSED CIFAR10_DIR EPOCHS RATE OUT SPEC=WEIGHTS... [cuda|cpu]: the first of the networks is the dense
one. A view is an epoch of images as `kronsearch finetune --val-fraction 0.01` would have them: augmented, in batches of
512, each mixed with itself in reverse order. What is learnt is the labels, and the mean of all networks' outputs for a
view and for its mirror image; no outputs of blocks. An epoch is as many batches, in an order of its own, of any view.
20 views are 6 GB of the device's memory.
"""

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronsearch as ks
from kronsearch.finetuning.course import long_settings
from kronsearch.models.apply import load_compressed, measured, save_compressed, stored_plan
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.data import Data
from kronsearch.training.distillation import softened_divergence
from kronsearch.training.evaluate import evaluate
from kronsearch.training.finetune import Trainer, trainable
from kronsearch.training.precision import KERNELS, forward_watched, precision_for
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.teacher import Teacher

VIEWS, BATCH, CLASSES = 20, 512, 10


class Views:
    """Batches of images with what is to be learnt of them: shares of the labels beside the outputs, (N, 20).

    The images are kept as bf16 of shape (batches, N, H, W, 3).
    """

    def __init__(self, data: Data, networks: list[nn.Module], device: torch.device) -> None:
        seeded, images, targets = torch.Generator().manual_seed(0), [], []
        for _ in range(VIEWS):
            for inputs, labels in data.train_batches(BATCH, generator=seeded, device=device):
                share = torch.rand((), generator=seeded).to(device)
                hot = F.one_hot(labels, CLASSES).float()
                images.append(torch.lerp(inputs.flip(0), inputs, share).permute(0, 2, 3, 1).bfloat16())
                targets.append(torch.lerp(hot.flip(0), hot, share))
        self.images, self.count = torch.stack(images), len(images) // VIEWS
        example, precision = self._batch(0), precision_for(device)
        teachers = [Teacher(network, (), example, precision=precision, compiled=False) for network in networks]
        outputs = [
            sum(teacher(view)[0] for teacher in teachers for view in (batch, batch.flip(-1))) / (2 * len(teachers))
            for batch in map(self._batch, range(len(images)))
        ]
        self.targets = torch.cat([torch.stack(targets), torch.stack(outputs)], dim=-1)
        self._seeded, self._order = torch.Generator().manual_seed(0), list[int]()

    def _batch(self, place: int) -> Tensor:
        found = self.images[place].permute(0, 3, 1, 2)
        return found if found.is_cuda else found.float()

    def take(self) -> tuple[tuple[Tensor, Tensor], int]:
        """Return a batch, all once before one comes again."""
        if not self._order:
            self._order = torch.randperm(len(self.images), generator=self._seeded).tolist()
        place = self._order.pop()
        return (self._batch(place), self.targets[place]), place

    def close(self) -> None:
        """Nothing reads ahead."""


class Pupil(Trainer):
    """A trainer that learns from views."""

    def __init__(self, model: nn.Module, data: Data, settings: TrainSettings, views: Views, device: torch.device):
        super().__init__(model, data, settings, generator=torch.Generator().manual_seed(0), device=device)
        self._batches = views

    def _loss(self, inputs: Tensor, labels: list[tuple[float, Tensor]]) -> Tensor:
        [(_, told)] = labels
        with kernels_formed(self.model, KERNELS[self._precision], self._runs):
            outputs, _ = forward_watched(self._runner, inputs, self._precision, self.model)
        by_labels = F.cross_entropy(outputs, told[:, :CLASSES])
        by_team = softened_divergence(outputs, told[:, CLASSES:], self._task, self.settings.temperature)
        return torch.lerp(by_team, by_labels, self.settings.label_weight)


def trained(trainer: Trainer, per_epoch: int) -> Iterator[tuple[float, ...]]:
    """Train to the end; yield rows of the log, one for 20 epochs."""
    began = time.monotonic()
    while trainer.step < trainer.total_steps:
        report = trainer.advance(20 * per_epoch)
        rounded = round(report.step / per_epoch, 2), round(report.loss, 4), report.learning_rate
        yield report.step, *rounded, round(report.images_per_second), round(time.monotonic() - began, 1)
        print(f"epoch {rounded[0]} of {trainer.total_steps / per_epoch:.2f}, loss {rounded[1]}", flush=True)


def main(start: str, folder: str, epochs: str, rate: str, out: str, *given: str) -> None:
    """Fine-tune and tell what came of it."""
    device = torch.device(given[-1] if "=" not in given[-1] else "cuda")
    pairs = [each.partition("=") for each in given if "=" in each]
    networks = [ks.load_model(spec, weights=weights).to(device).eval() for spec, _, weights in pairs]
    data, plan = ks.load_data(f"cifar10:{folder}", seed=0, val_fraction=0.01), stored_plan(start)
    small = trainable(load_compressed(networks[0], start).to(device))
    views = Views(data, networks, device)
    settings = long_settings(data, epochs=float(epochs), lr=float(rate), batch_size=BATCH, label_weight=0.5)
    Path(out).mkdir(parents=True, exist_ok=True)
    with (
        Pupil(small, data, replace(settings, mixing=False), views, device) as trainer,
        (Path(out) / "log.csv").open("w", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "epoch", "loss", "lr", "images_per_second", "seconds"))
        rows.writerows(trained(trainer, views.count))
        result = trainer.result
    print(f"test: {evaluate(result, data, 'test', device=device).metric:.2%}")
    plan = measured(plan, networks[0], result)
    save_compressed(result, plan, Path(out) / "compressed.safetensors", epochs=float(epochs))


if __name__ == "__main__":
    main(*sys.argv[1:])
