"""Plans near the plain allocation: how many are better, and what foretells it.

python around.py WEIGHTS CIFAR10_DIR CACHE OUT.csv COUNT BUDGET...

ResNet-20; BUDGET is such as flops=33% or params=20%. The first plan of a budget is the plain allocation's; for each of
the others every layer has an importance of its own, drawn with a standard deviation of 0.15, 0.3 or 0.5 (of the
logarithm), and so have structures, curvature and trust. Nothing is trained. A row of OUT.csv holds

predicted      the predicted error
change         the mean squared change of the outputs on 2,048 training images, statistics of the batch in batch norms
train          the divergence from the dense network's outputs there
validation     the same on the 5,000 validation images, batch norms re-estimated, and `fewer` on the first 2,500 of them
test           the same on the 10,000 test images

and what is printed is Spearman's rank correlation of each with the last.
"""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import kronsearch as ks
from kronsearch.models.factorised import replace_layers
from kronsearch.models.shelf import Shelf
from kronsearch.search.candidates import Candidates
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import specs_of
from kronsearch.search.score import Scorer
from kronsearch.search.sensitivity import Damage
from kronsearch.search.subject import Subject
from kronsearch.training.evaluate import outputs

IMAGES = 2048
SPREADS = (0.15, 0.3, 0.5)


class Varied(Problem):
    """A problem whose layers have importances of their own."""

    extra: dict[str, float]

    def weighed(self, layer: Candidates, weighing: Weighing) -> NDArray[np.float64]:
        return super().weighed(layer, weighing) * math.exp(self.extra.get(layer.name, 0.0))


def apart(ours: Tensor, wanted: Tensor) -> Tensor:
    """Return the divergence for each example."""
    return F.kl_div(ours.float().log_softmax(1), wanted.float().log_softmax(1), reduction="none", log_target=True).sum(
        1
    )


def main(weights: str, folder: str, cache: str, out: str, count: int, asked: list[str]) -> None:
    """Draw, measure and print."""
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    subject = Subject(ks.load_model("zoo:cifar_resnet20", weights=weights), data, cache=cache)
    dense, prepared = subject.dense, subject.prepared()
    candidates, sensitivity = subject.tables(prepared)
    scorer = Scorer(dense, data, prepared.metrics, subject.settings, "cpu")
    damage = Damage(dense, data, subject.cost.macs, prepared, seed=0, shelf=Shelf(None), device="cpu")
    damage._inputs = damage._fitting(damage._images(IMAGES))
    wanted = damage._outputs(copy.deepcopy(dense))
    val, test = (outputs(dense, data, split, precision="bfloat16") for split in ("val", "test"))
    names, rows = [layer.name for layer in candidates], []
    for budget in asked:
        kind, amount = budget.split("=")
        bounds = {"dense_macs": subject.cost.macs, "dense_params": subject.cost.params}
        problem = Varied(subject.cost, ks.Budget(**{kind: amount}).limits(**bounds), candidates, sensitivity)
        kinds, generator = problem.structures, np.random.default_rng(0)
        for number in range(count):
            spread = 0.0 if number == 0 else SPREADS[number % 3]
            drawn = spread * generator.standard_normal(len(names) + len(kinds) + 2)
            Varied.extra = dict(zip(names, drawn, strict=False))
            weighing = Weighing(
                trust=float(np.clip(0.5 + 0.5 * drawn[-2], 0, 1)),
                curvature=1 + 0.3 * drawn[-1],
                price=dict(zip(kinds, 0.5 * drawn[len(names) :], strict=False)),
            )
            allocation = problem.allocate(weighing)
            specs = specs_of(candidates, allocation)
            layers = {name: copy.deepcopy(scorer.layer(name, spec)) for name, spec in specs.items()}
            seen = damage._outputs(replace_layers(dense, layers))
            small = scorer.build(specs)
            validation = apart(outputs(small, data, "val", precision="bfloat16"), val)
            pairs = list(zip(seen, wanted, strict=True))
            rows.append(
                {
                    "budget": budget,
                    "spread": spread,
                    "predicted": problem.predicted_error(allocation.chosen),
                    "change": float(torch.cat([(a.float() - b.float()).square().sum(1) for a, b in pairs]).mean()),
                    "train": float(torch.cat([apart(a, b) for a, b in pairs]).mean()),
                    "fewer": float(validation[:2500].mean()),
                    "validation": float(validation.mean()),
                    "test": float(apart(outputs(small, data, "test", precision="bfloat16"), test).mean()),
                }
            )
            pd.DataFrame(rows).to_csv(Path(out), index=False)
        table = pd.DataFrame([row for row in rows if row["budget"] == budget])
        print(budget, len(table), table.drop(columns="budget").rank().corr()["test"].round(3).to_dict(), flush=True)
        ratio = table["test"] / table["test"][0]
        print(ratio.groupby(table["spread"]).describe()[["count", "min", "50%", "max"]].round(3), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:5], int(sys.argv[5]), sys.argv[6:])
