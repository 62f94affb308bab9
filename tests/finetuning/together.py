"""Trains alone, or together where torchrun starts it: python together.py FOLDER. Not a test by itself.

The folder has the plan.json to train by.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import kronsearch as ks
from kronsearch.training import finetune
from kronsearch.training.data import TensorData
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.task import Classification
from kronsearch.training.team import join


class Plain(nn.Module):
    """Nothing in it sees more than one example at a time; a parameter is without use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(torch.relu(self.conv(x))).mean(dim=(2, 3)))


class Normalised(Plain):
    """Batch norm and dropout, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2))


def network(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return kind().eval()


def tiny_data() -> TensorData:
    generator, splits = torch.Generator().manual_seed(7), {}
    for split, count in (("train", 65), ("val", 30), ("test", 30)):
        labels = torch.arange(count) % 3
        noise = torch.randint(60, (count, 2, 6, 5), generator=generator)
        splits[split] = ((noise + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
    task = Classification(3)
    return TensorData(splits, spec="tiny", seed=0, task=task, mean=(0.4, 0.5), std=(0.2, 0.3), pad=1, flip=True)


def main(folder: Path) -> None:
    finetune.precision_for = lambda device: "float32"
    data, dense, plan = tiny_data(), network(Plain), ks.load_plan(folder / "plan.json")
    small = ks.apply_plan(dense, plan, data)
    settings = TrainSettings(epochs=3, batch_size=13, lr=0.01, label_weight=0.5, mixing=True, hints=0.5)  # 13 is odd
    team, device = join("cpu")
    if not team.leads:
        small.head.weight.data.zero_()  # it takes on the first one's
    options = {"teacher": dense, "generator": torch.Generator().manual_seed(0), "device": device, "team": team}
    with finetune.Trainer(small, data, settings, **options) as trainer:
        losses = [trainer.advance(5).loss for _ in range(3)]
    kept = dict(small.named_parameters()) | {"losses": torch.tensor(losses)}
    save_file({name: tensor.detach() for name, tensor in kept.items()}, folder / f"plain-{team.rank}.safetensors")

    options = {"epochs": 3, "batch_size": 13, "lr": 0.01, "out": folder / f"out-{team.size}"}
    result = ks.finetune(network(Normalised), plan, data, **options)
    again = ks.finetune(network(Normalised), plan, data, **options)
    assert again.was_done
    for name, found in (("first", result), ("again", again)):
        kept = found.model.state_dict() | {"told": torch.tensor([found.compressed.metric, found.compressed.loss])}
        save_file(kept, folder / f"{name}-{team.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
