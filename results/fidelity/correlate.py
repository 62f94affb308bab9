"""How well each fidelity foretells what a plan is worth after a long fine-tune.

python correlate.py SCORES.csv WEIGHTS CIFAR10_DIR FILE...: the FILEs are the fine-tuned networks of the plans in
SCORES.csv, in its order. Prints Spearman's rank correlation of each fidelity with the test accuracy and the divergence
from the dense network on the test split, both signed so that 1 is best, and writes plans.csv beside SCORES.csv.
"""

import sys
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr

import kronsearch as ks
from kronsearch.models.apply import load_compressed, stored_plan
from kronsearch.training.evaluate import evaluate, outputs

FIDELITIES = {
    "predicted error": 1,
    "settled divergence": 1,
    "settled accuracy": -1,
    "proxy divergence": 1,
    "proxy accuracy": -1,
}


def main(scores: Path, weights: str, folder: str, files: list[str]) -> None:
    """Evaluate, join and correlate."""
    table = pd.read_csv(scores)
    model = ks.load_model(stored_plan(files[0]).model.spec, weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    wanted = outputs(model, data, "test")
    found = [evaluate(load_compressed(model, file), data, "test", teacher_outputs=wanted) for file in files]
    table["test accuracy"] = [one.metric for one in found]
    table["test divergence"] = [one.divergence for one in found]
    table.to_csv(scores.with_name("plans.csv"), index=False)
    for name, sign in FIDELITIES.items():
        with_accuracy = -sign * spearmanr(table[name], table["test accuracy"]).statistic
        with_divergence = sign * spearmanr(table[name], table["test divergence"]).statistic
        print(f"{name}: {with_accuracy:.2f} with test accuracy, {with_divergence:.2f} with test divergence")
    print(f"n {len(table)}; {table['test accuracy'].min():.2%} to {table['test accuracy'].max():.2%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4:])
