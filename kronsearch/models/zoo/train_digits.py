"""Train the digits network from scratch and write its weights: `python -m kronsearch.models.zoo.train_digits`."""

import argparse
import sys
from pathlib import Path

import torch

from kronsearch.models.checkpoint import save_safetensors
from kronsearch.models.zoo.digits import DIGITS_WEIGHTS, DigitsResNet, digits
from kronsearch.training.data import Data
from kronsearch.training.evaluate import evaluate
from kronsearch.training.finetune import finetune
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.sources import load_data

__all__ = ["SETTINGS", "main", "train_digits"]

SETTINGS = TrainSettings(epochs=60, batch_size=64, lr=3e-3, weight_decay=0.05)


def train_digits(data: Data, settings: TrainSettings = SETTINGS, *, seed: int = 0) -> DigitsResNet:
    """Return the network trained on the training split of `data`, in eval mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = digits()
    finetune(model, data, settings, generator=torch.Generator().manual_seed(seed))
    return model


def main() -> None:
    """Train, write the file and tell the accuracy on validation and test split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DIGITS_WEIGHTS, help="file to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = load_data("digits", seed=options.seed)
    model = train_digits(data, seed=options.seed)
    save_safetensors(model, options.out, {"model": "zoo:digits", "data": "digits", "seed": str(options.seed)})
    for split in ("val", "test"):
        result = evaluate(model, data, split)
        sys.stdout.write(f"{split} {data.task.metric_name} {result.metric:.4f} of {result.n}\n")


if __name__ == "__main__":
    main()
