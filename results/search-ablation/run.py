"""What the search adds: the same budget by several means, each plan after one common fine-tune.

python run.py --weights WEIGHTS --data CIFAR10_DIR --out OUT [--model zoo:cifar_resnet20] [--budgets params=20%]
    [--seeds 0] [--arms uniform,fisher,…] [--seconds 200] [--epochs 1]

OUT gets a row in rows.csv for each budget, seed and arm that is done, and each test image's outcome beside it; what is
there is not done again, so the same line goes on where it was stopped, and others add budgets, seeds and arms. An arm
that searches has so many seconds of the process's own time for its trials, whatever else the machine does, and its
finalists are fine-tuned after that; error tables, sensitivities and contributions in context are computed before, once
for all arms. Plans that several arms come to are fine-tuned once a seed.

uniform        CP of one rank ratio for all layers but the first convolution and the last layer, as the budget allows
plain, absolute, inputs, fisher, measured
               the plain allocation with each of the sensitivities, without any search
context        the allocation with measured sensitivities and what is known of layers in the plain plan's network
random, gp, tpe, cmaes
               trials that decide how errors are weighed (measured sensitivity), by each sampler
wide           as gp, with bounds of the logarithms that are twice as wide
direct         trials that decide each layer's place on its front, a Gaussian process, the budget as a constraint
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from torch.nn import functional as F

import kronsearch as ks
from kronsearch.files import replacing
from kronsearch.finetuning.course import long_settings, new_trainer
from kronsearch.search import decoders
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.decoders import new_decoder
from kronsearch.search.draft import Draft
from kronsearch.search.finals import Finals
from kronsearch.search.pace import Pace, specs_of
from kronsearch.search.sensitivity import estimated
from kronsearch.search.stopwatch import Setting
from kronsearch.search.study import Study, plan_of
from kronsearch.search.subject import Subject
from kronsearch.search.work import Work
from kronsearch.sekron import SeKronSpec, count_macs, cp_sequence
from kronsearch.training.evaluate import outputs

ESTIMATED = ("plain", "absolute", "inputs", "fisher")
SEARCHED = {  # decoder, sampler, how many times as wide as by default the bounds of the weighing are
    "gp": ("allocate", "gp", 1),
    "random": ("allocate", "random", 1),
    "direct": ("direct", "gp", 1),
    "tpe": ("allocate", "tpe", 1),
    "cmaes": ("allocate", "cmaes", 1),
    "wide": ("allocate", "gp", 2),
}
ARMS = (  # the most important first
    "measured",
    "gp",
    "context",
    "fisher",
    "uniform",
    "random",
    "direct",
    "tpe",
    "plain",
    "absolute",
    "inputs",
    "cmaes",
    "wide",
)
BOUNDS = decoders._IMPORTANCE, decoders._PRICE, decoders._CURVATURE
MANY = 10_000  # trials that are asked for: time ends them
SHARED = ("accuracy", "divergence", "n", "macs", "params", "settled_divergence", "tune_seconds")

Specs = dict[str, SeKronSpec]


def uniform(cost: ks.ModelCost, problem: Problem) -> Specs:
    """Return CP specs that leave every layer the same part of what the budget bounds, as much as it allows."""
    names = [layer.name for layer in problem.candidates if cp_sequence(layer.kernel_shape)]
    layers = [cost.layer(name) for name in names[1:]]
    best: Specs = {}
    for permille in range(1, 1001):
        specs, macs, params = {}, cost.macs, cost.params
        for layer in layers:
            unit = SeKronSpec(cp_sequence(layer.kernel_shape), (1, 1))
            per_rank = sum(count_macs(unit, layer.geometry, call) for call in layer.calls)
            by_params = layer.kernel_params * permille // (1000 * unit.params)
            by_macs = layer.kernel_macs * permille // (1000 * per_rank)
            rank = max(1, by_params if problem.limits.params is not None else by_macs)
            specs[layer.name] = SeKronSpec(unit.factor_shapes, (rank, 1))
            macs += rank * per_rank - layer.kernel_macs
            params += rank * unit.params - layer.kernel_params
        if not problem.bounds.hold(macs=macs, params=params):
            break
        best = specs
    return best


class Bench:
    """One network, its data and one seed: what all arms share.

    Args:
        options: of the command line.
        seed: of calibration, search and fine-tune.
    """

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.data = ks.load_data(f"cifar10:{options.data}", seed=0)
        self.subject = Subject(
            ks.load_model(options.model, weights=options.weights),
            self.data,
            seed=seed,
            cache=options.out / "cache",
            sensitivity="measured",
        )
        self.prepared = self.subject.prepared()
        began = time.process_time()
        self.candidates, measured = self.subject.tables(self.prepared)
        print(f"seed {seed}: tables and sensitivities {time.process_time() - began:.0f} s of CPU", flush=True)
        metrics, dense, names = self.prepared.metrics, self.subject.dense, self.subject.names
        self.sensitivities = {name: estimated(name, dense, names, metrics) for name in ESTIMATED}
        self.sensitivities["measured"] = measured
        self.wanted = outputs(dense, self.data, "test")
        with torch.no_grad():
            self.labels = torch.cat([labels for _, labels in self.data.batches("test", 500)])

    def work(self, budget: ks.Budget, arm: str) -> Work:
        """Return the state of a search."""
        subject = self.subject
        pace = Pace(budget, subject.stopwatch(Setting(1, 1)), allow_slower=True)
        limits = pace.limits(subject.cost)
        draft = Draft(subject.space, budget, subject.settings, self.seed, self.options.model)
        work = Work(subject, limits, draft, pace, new_decoder(SEARCHED.get(arm, ("allocate",))[0]))
        work.problem = Problem(
            subject.cost, limits, self.candidates, self.sensitivities.get(arm, self.sensitivities["measured"])
        )
        if arm in SEARCHED or arm == "context":
            began, scorer = time.process_time(), work.scorer()
            assert scorer is not None
            context = subject.context(self.prepared, scorer)
            assert context is not None
            work.problem = context.known(work.problem)
            print(f"seed {self.seed}: context {time.process_time() - began:.0f} s of CPU", flush=True)
        return work

    def specs(self, work: Work, arm: str, folder: Path) -> tuple[Specs, dict[str, object]]:
        """Return what an arm replaces, and what there is to tell of how it came to that."""
        if arm == "uniform":
            return uniform(self.subject.cost, work.problem), {}
        if arm in self.sensitivities:
            return specs_of(self.candidates, work.problem.allocate(Weighing())), {}
        if arm == "context":
            return specs_of(self.candidates, work.problem.allocate(Weighing(context=1.0))), {}
        return self.search(work, arm, folder)

    def search(self, work: Work, arm: str, folder: Path) -> tuple[Specs, dict[str, object]]:
        """Return the winner of as many trials as the time allows."""
        _, sampler, wider = SEARCHED[arm]
        decoders._IMPORTANCE, decoders._PRICE, decoders._CURVATURE = (wider * bound for bound in BOUNDS)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.db").unlink(missing_ok=True)  # of a run that was stopped: its time isn't known
        ledger = Study(
            f"sqlite:///{folder / 'study.db'}",
            "s",
            {"arm": arm},
            seed=self.seed,
            sampler=sampler,
        )
        given = work.decoder.given(work.problem)
        began = time.process_time()
        while time.process_time() - began < self.options.seconds:
            trial = ledger.ask(range(MANY), given)
            assert trial is not None
            with ledger.at_work(trial):
                work.trial(ledger, trial, MANY)
        took, first = time.process_time() - began, ledger.ranked()[0]
        finals = Finals(ledger, higher_is_better=True)
        work.play(finals)
        won, table = finals.winner(), finals.table()
        assert won is not None
        best, measured = won
        table.to_csv(folder / "trials.csv", index=False)
        told = {
            "trials": len(table),
            "failed": int((table["state"] != "complete").sum()),
            "first": first.user_attrs["slot"],  # before the finals
            "winner": best.user_attrs["slot"],
            "search_seconds": round(took, 1),
            "finals_seconds": round(time.process_time() - began - took, 1),
            "least_divergence": first.value,  # before the finals
            "plain_divergence": float(table["divergence"][0]),
            "tuned_divergence": measured.value,
            "plain_tuned_divergence": float(table["tuned_divergence"][0]),
        }
        return plan_of(best).replaced, told

    def tuned(self, work: Work, specs: Specs) -> tuple[torch.Tensor, dict[str, object]]:
        """Return the outputs on the test split after the common fine-tune, and what the network costs."""
        scorer = work.scorer()
        small = scorer.build(specs)
        settled = scorer.settled(small)
        cost = ks.profile_model(small, input_shape=self.data.input_shape)
        assert work.problem.bounds.hold(macs=cost.macs, params=cost.params)
        began = time.process_time()
        settings = long_settings(self.data, epochs=self.options.epochs)
        with new_trainer(self.subject.dense, small, specs, self.data, settings, seed=self.seed) as trainer:
            trainer.advance(trainer.total_steps)
        told = {"macs": cost.macs, "params": cost.params, "settled_divergence": settled.divergence}
        told["tune_seconds"] = round(time.process_time() - began, 1)
        return outputs(trainer.result, self.data, "test"), told


def main() -> None:
    """Run what isn't done yet."""
    options = arguments()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = {name: getattr(options, name) for name in ("model", "seconds", "epochs")}
    for seed in options.seeds:
        bench: Bench | None = None
        for asked in options.budgets:
            for arm in options.arms:
                key = {"budget": asked, "seed": seed, "arm": arm}
                if not any(alike(row, key | settings) for row in rows(options.out)):
                    bench = bench or Bench(options, seed)
                    run(bench, key | settings)


def run(bench: Bench, key: dict[str, object]) -> None:
    """Do one arm, and add its row."""
    out, arm, (kind, amount) = bench.options.out, str(key["arm"]), str(key["budget"]).split("=")
    work = bench.work(ks.Budget(**{kind: amount}), arm)
    specs, told = bench.specs(work, arm, out / f"{kind}{amount.strip('%')}-{bench.seed}-{arm}")
    digest = hashlib.sha256(repr(sorted(specs.items())).encode()).hexdigest()[:16]
    same = {name: value for name, value in key.items() if name not in ("arm", "budget")} | {"digest": digest}
    twin = next((row for row in rows(out) if alike(row, same)), None)
    if twin is None:
        logits, cost = bench.tuned(work, specs)
        right, apart = by_image(bench, logits)
        kept = {"accuracy": right.float().mean().item(), "divergence": apart.mean().item(), "n": len(right), **cost}
        with replacing(out / f"{digest}-{bench.seed}.npz") as place, place.open("wb") as file:
            np.savez_compressed(file, right=right.numpy(), apart=apart.numpy())
    else:
        kept = {name: twin[name] for name in SHARED}
    row = {**key, "digest": digest, **told, **kept}
    with replacing(out / "rows.csv") as path:
        pd.DataFrame([*rows(out), row]).to_csv(path, index=False)
    print(json.dumps(row), flush=True)


def alike(row: dict[str, object], key: dict[str, object]) -> bool:
    """Tell whether a row has all of these values."""
    return all(row.get(name) == value for name, value in key.items())


def rows(out: Path) -> list[dict[str, object]]:
    """Return what is done."""
    path = out / "rows.csv"
    return pd.read_csv(path).to_dict("records") if path.is_file() else []


def by_image(bench: Bench, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each test image whether it is told right, and the divergence from the dense network's outputs."""
    apart = F.kl_div(logits.log_softmax(1), bench.wanted.log_softmax(1), reduction="none", log_target=True).sum(1)
    return logits.argmax(1) == bench.labels, apart


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="zoo:cifar_resnet20")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["params=20%"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        sys.exit(f"no arms {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
