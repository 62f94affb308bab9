"""Plans of equal cost, drawn at random from what a trial can choose, with all that a search would know of each.

python plans.py MODEL WEIGHTS CIFAR10_DIR BUDGET COUNT OUT

Writes OUT/NN.safetensors, to be fine-tuned for long, and OUT/scores.csv: predicted error, and accuracy and divergence
from the dense network, with batch norms re-estimated (on training images) and after the proxy fine-tune (on the
validation split). The first is the plain allocation.
"""

import sys
from pathlib import Path

import optuna
import pandas as pd

import kronsearch as ks
from kronsearch.models.apply import save_compressed
from kronsearch.search.decode import Problem
from kronsearch.search.decoders import Allocate
from kronsearch.search.draft import Draft
from kronsearch.search.score import Scorer
from kronsearch.search.space import load_space
from kronsearch.search.subject import Subject


def main(spec: str, weights: str, folder: str, flops: str, count: int, out: Path) -> None:
    """Draw the plans and score each."""
    model, data = ks.load_model(spec, weights=weights), ks.load_data(f"cifar10:{folder}", seed=0)
    subject = Subject(model, data, cache="cache", sensitivity="fisher")
    prepared = subject.prepared()
    budget = ks.Budget(flops=flops)
    limits = budget.limits(dense_macs=subject.cost.macs, dense_params=subject.cost.params)
    problem = Problem(subject.cost, limits, *subject.tables(prepared))
    scorer = Scorer(subject.dense, data, prepared.metrics, subject.settings, "cpu")
    draft = Draft(load_space("default"), budget, subject.settings, 0, spec)
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(dict(Allocate().given(problem)(0) or {}))
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        plan = draft.plan(problem, problem.allocate(Allocate().suggest(study.ask(), problem)))
        small = scorer.build(plan.replaced)
        save_compressed(small, plan, out / f"{len(rows):02d}.safetensors")
        settled = scorer.settled(small)
        tuned = scorer.proxy(small, 0)
        rows.append(
            {
                "plan": len(rows),
                "macs": plan.compressed.macs,
                "params": plan.compressed.params,
                "predicted error": plan.predicted_error,
                "settled accuracy": settled.metric,
                "settled divergence": settled.divergence,
                "proxy accuracy": tuned.metric,
                "proxy divergence": tuned.divergence,
            }
        )
        pd.DataFrame(rows).to_csv(out / "scores.csv", index=False)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main(*sys.argv[1:5], int(sys.argv[5]), Path(sys.argv[6]))
