"""Which sampler finds the plan of least divergence soonest, where a plan costs seconds because nothing is fine-tuned.

python compare.py MODEL WEIGHTS|- DATA BUDGET TRIALS SEEDS SAMPLER...: the objective is the divergence from the dense
network on 500 validation images, after batch norms are re-estimated on 512 training images. Each study begins with the
three plans that every search begins with.
"""

import statistics
import sys
import time
import warnings

import optuna

import kronsearch as ks
from kronsearch.search.decode import Problem
from kronsearch.search.decoders import Allocate
from kronsearch.search.score import Scorer
from kronsearch.search.subject import Subject
from kronsearch.training.evaluate import evaluate, outputs

IMAGES = 500
SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(n_startup_trials=6, seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(n_startup_trials=6, seed=seed, deterministic_objective=True),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(n_startup_trials=6, seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def main(model: str, weights: str, data: str, budget: str, trials: int, seeds: int, *samplers: str) -> None:
    network = ks.load_model(model, weights=None if weights == "-" else weights)
    images = ks.load_data(data, seed=0)
    subject = Subject(network, images, cache="cache", sensitivity="fisher")
    prepared = subject.prepared()
    limits = ks.Budget(flops=budget).limits(dense_macs=subject.cost.macs, dense_params=subject.cost.params)
    problem = Problem(subject.cost, limits, *subject.tables(prepared))
    settings = subject.settings.model_copy(update={"batchnorm_images": 512})
    scorer = Scorer(subject.dense, images, prepared.metrics, settings, "cpu")
    wanted = outputs(subject.dense, images, "val", limit=IMAGES)
    known: dict[tuple[int, ...], float] = {}

    def objective(trial: optuna.Trial) -> float:
        chosen = problem.allocate(Allocate().suggest(trial, problem)).chosen
        if tuple(chosen) not in known:
            specs = {
                layer.name: spec
                for layer, index in zip(problem.candidates, chosen, strict=True)
                if (spec := layer.spec(index)) is not None
            }
            found = evaluate(scorer.build(specs), images, "val", teacher_outputs=wanted, limit=IMAGES)
            known[tuple(chosen)] = found.divergence or 0.0
        return known[tuple(chosen)]

    given = Allocate().given(problem)
    for name in samplers:
        began, ratios = time.monotonic(), {trials // 2: [], trials: []}
        for seed in range(seeds):
            study = optuna.create_study(sampler=SAMPLERS[name](seed))
            for slot in range(3):
                study.enqueue_trial(dict(given(slot) or {}))
            study.optimize(objective, n_trials=trials)
            values = [trial.value or 0.0 for trial in study.get_trials()]
            for count, found in ratios.items():
                found.append(min(values[:count]) / values[0])
        for count, found in ratios.items():
            each = ", ".join(f"{ratio:.3f}" for ratio in sorted(found))
            print(f"{name}, best of {count}: median {statistics.median(found):.3f} of the plain plan's ({each})")
        print(f"{name}: {time.monotonic() - began:.0f} s, {len(known)} different plans so far", flush=True)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]), *sys.argv[7:])
