"""What the plain allocation's plan is worth before any training, by the sensitivity that it trusts.

python sensitivities.py MODEL WEIGHTS CIFAR10_DIR CACHE BUDGET...

BUDGET is such as flops=33% or params=20%. Each row holds the divergence from the dense network on 2,500 validation
images, batch norms re-estimated, and in brackets its ratio to that of `fisher`; the last row is the geometric mean of
these ratios. `measured` is at a squared error of 0.05; besides it at 0.01 and 0.15, and `levels`: all three, made
isotonic and interpolated by the candidate's error, so that a layer has a curve instead of a number.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import kronsearch as ks
from kronsearch.models.shelf import Shelf
from kronsearch.search import sensitivity
from kronsearch.search.allocate import Choices
from kronsearch.search.candidates import Candidates
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import specs_of
from kronsearch.search.score import Scorer
from kronsearch.search.sensitivity import Damage, estimated
from kronsearch.search.subject import Subject

LEVELS = (0.01, 0.05, 0.15)


class Curved(Problem):
    """A problem whose layers have a curve of sensitivity over error."""

    curves: dict[str, tuple[np.ndarray, np.ndarray]]

    def _choices(self, layer: Candidates, weighing: Weighing) -> Choices:
        error, change = self.curves[layer.name]
        per_error = np.log(np.maximum.accumulate(change) / error)
        weight = np.exp(np.interp(np.log(np.maximum(layer.error, 1e-9)), np.log(error), per_error))
        return Choices(layer.costs, weight**weighing.trust * layer.error)


def main(model: str, weights: str, folder: str, cache: str, budgets: Sequence[str]) -> None:
    """Measure and print."""
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    subject = Subject(ks.load_model(model, weights=weights), data, cache=cache, sensitivity="fisher")
    prepared = subject.prepared()
    candidates, fisher = subject.tables(prepared)
    arms = {"fisher": fisher}
    for name in ("plain", "absolute", "inputs"):
        arms[name] = estimated(name, subject.dense, subject.names, prepared.metrics)
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in subject.names}
    for level in LEVELS:
        sensitivity._LEVEL, began = level, time.process_time()
        damage = Damage(
            *(subject.dense, data, subject.cost.macs, prepared), seed=0, shelf=Shelf(Path(cache)), device="cpu"
        )
        found = damage.sensitivity(candidates, lambda *_: None)
        print(f"measured at {level}: {time.process_time() - began:.0f} s of CPU", flush=True)
        arms["measured" if level == 0.05 else f"measured at {level}"] = found
        for layer in candidates:
            if (index := sensitivity._nearest(layer)) is not None:
                error = float(layer.error[index])
                curves[layer.name].append((error, found[layer.name] * error))
    Curved.curves = {name: np.array(sorted(set(points))).T for name, points in curves.items() if points}
    scorer = Scorer(subject.dense, data, prepared.metrics, subject.settings, "cpu")
    known: dict[tuple[int, ...], float] = {}
    print(f"\n| {model} | {' | '.join([*arms, 'levels'])} |\n|{'---|' * (len(arms) + 2)}")
    ratios = []
    for asked in budgets:
        kind, amount = asked.split("=")
        bounds = {"dense_macs": subject.cost.macs, "dense_params": subject.cost.params}
        limits = ks.Budget(**{kind: amount}).limits(**bounds)
        problems = [Problem(subject.cost, limits, candidates, arm) for arm in arms.values()]
        found = []
        for problem in [*problems, Curved(subject.cost, limits, candidates, fisher)]:
            allocation = problem.allocate(Weighing())
            if allocation.chosen not in known:
                small = scorer.build(specs_of(candidates, allocation))
                known[allocation.chosen] = scorer.settled(small).divergence or 0.0
            found.append(known[allocation.chosen])
        ratios.append(np.array(found) / found[0])
        told = " | ".join(f"{value:.4f} ({ratio:.2f})" for value, ratio in zip(found, ratios[-1], strict=True))
        print(f"| {asked} | {told} |", flush=True)
    print(f"| geometric mean | {' | '.join(f'{ratio:.2f}' for ratio in np.exp(np.log(ratios).mean(0)))} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:5], sys.argv[5:])
