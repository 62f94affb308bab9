"""Plans of equal cost, drawn at random from what a trial can choose, with all that a search would know of each.

python plans.py MODEL WEIGHTS CIFAR10_DIR BUDGET COUNT OUT

Writes OUT/NN.safetensors, to be fine-tuned for long, and OUT/scores.csv: predicted error, and accuracy and divergence
from the dense network, with batch norms re-estimated (on training images) and after the proxy fine-tune (on the
validation split). The first is the plain allocation.
Weighings are drawn from bounds that are wider than those of searches today, as these had them when the plans were made
that `plans.csv` tells of.
"""

import sys
from pathlib import Path

import optuna
import pandas as pd

import kronsearch as ks
from kronsearch.models.apply import save_compressed
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.draft import Draft
from kronsearch.search.score import Scorer
from kronsearch.search.space import load_space
from kronsearch.search.subject import Subject


def drawn(trial: optuna.Trial, problem: Problem) -> Weighing:
    """Return a weighing that is drawn at random."""
    return Weighing(
        trust=trial.suggest_float("trust", 0.0, 1.0),
        curvature=trial.suggest_float("curvature", 0.6, 1.4),
        importance={group: trial.suggest_float(f"importance/{group}", -1.0, 1.0) for group in problem.groups},
        price={kind: trial.suggest_float(f"price/{kind}", -0.7, 0.7) for kind in problem.structures},
    )


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
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        trial = study.ask()
        plan = draft.plan(problem, problem.allocate(drawn(trial, problem) if rows else Weighing()))
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
