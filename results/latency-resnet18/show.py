"""Plans of torchvision's ResNet-18 under budgets of latency and of MACs, timed; predicted against measured latency.

The weights are random, as none can be downloaded: kernels' shapes decide how long they take. Errors are then those of
random kernels, which are harder to approximate than trained ones, so the plans are harder to make fast than real ones.

    OMP_NUM_THREADS=2 python results/latency-resnet18/show.py --threads 2 --out DIR
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

import kronsearch as ks
from kronsearch.models.latency import random_network
from kronsearch.search.candidates import Candidates
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import Pace
from kronsearch.search.stopwatch import Setting, Stopwatch
from kronsearch.search.subject import Subject
from kronsearch.sekron import SeKronSpec

BUDGETS = (ks.Budget(latency="60%"), ks.Budget(flops="50%"))
SHAPE = (3, 224, 224)
SECONDS = 20.0  # of the whole networks, and again of the layers


def main() -> None:
    """Make the plans for each batch, time them layer by layer, and hold predictions against measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--plans", type=int, default=20, help="random plans to predict, at the first batch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of error tables and timings [default: OUT/cache]")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ks.load_model("torchvision:resnet18")
    subject = Subject(
        model,
        None,
        input_shape=SHAPE,
        out=options.out,
        cache=options.cache,
        sensitivity="fisher",
    )
    candidates, sensitivity = subject.tables(subject.prepared())
    options.out.mkdir(parents=True, exist_ok=True)
    layers, wholes = [], []
    for batch in options.batch:
        stopwatch = subject.stopwatch(Setting(batch, options.threads))
        for budget in BUDGETS:
            pace = Pace(budget, stopwatch, allow_slower=False)
            plain = Problem(subject.cost, pace.limits(subject.cost), candidates, sensitivity)
            problem = pace.problem(plain)
            found = pace.allocate(problem, Weighing())
            assert found is not None, f"{budget} was missed"
            timed = _timed(subject, problem, found[0].chosen, budget, batch, options.threads)
            wholes += timed[:1]
            layers += timed[1:]
            lifted = problem is plain or (budget.latency is None and problem.limits.latency is None)
            print(_lines(timed, lifted=lifted), flush=True)
    pd.DataFrame(wholes).to_csv(options.out / "networks.csv", index=False)
    pd.DataFrame(layers).to_csv(options.out / "layers.csv", index=False)
    stopwatch = subject.stopwatch(Setting(options.batch[0], options.threads))
    table = pd.DataFrame(_predictions(subject, stopwatch, candidates, options.plans))
    table.to_csv(options.out / "predictions.csv", index=False)
    errors = (table["predicted"] / table["measured"] - 1).abs()
    rank = spearmanr(table["predicted"], table["measured"])[0]
    print(
        f"predicted against measured, n {len(table)}: Spearman {rank:.3f}, "
        f"error median {errors.median():.1%}, largest {errors.max():.1%}"
    )


def _timed(
    subject: Subject, problem: Problem, chosen: tuple[int, ...], budget: ks.Budget, batch: int, threads: int
) -> list[dict[str, object]]:
    """Return a row for the whole network and one for each replaced layer."""
    specs = {
        layer.name: spec
        for layer, index in zip(problem.candidates, chosen, strict=True)
        if (spec := layer.spec(index)) is not None
    }
    saved = {
        layer.name: layer.macs[0] / layer.macs[index] for layer, index in zip(problem.candidates, chosen, strict=True)
    }
    compressed = subject.cost.macs - sum(
        int(layer.macs[0] - layer.macs[index]) for layer, index in zip(problem.candidates, chosen, strict=True)
    )
    saved[""] = subject.cost.macs / compressed
    timings = ks.bench(
        subject.dense,
        random_network(subject.dense, specs),
        input_shape=SHAPE,
        batches=(batch,),
        threads=(threads,),
        seconds=SECONDS,
    )
    return [
        {
            "budget": str(budget),
            "batch": batch,
            "threads": threads,
            "layer": timing.layer,
            "becomes": str(specs.get(timing.layer, "")),
            "dense_ms": timing.dense_ms,
            "compressed_ms": timing.compressed_ms,
            "speedup": timing.speedup,
            "speedup_low": timing.speedup_low,
            "speedup_high": timing.speedup_high,
            "pairs": timing.pairs,
            "macs_saved": saved[timing.layer],
            "of_ideal": timing.speedup / saved[timing.layer],
        }
        for timing in timings
    ]


def _lines(rows: list[dict[str, object]], *, lifted: bool) -> str:
    table = pd.DataFrame(rows).set_index("layer")
    whole, told = rows[0], table.drop(columns=["budget", "batch", "threads", "speedup_low", "speedup_high"])
    title = f"{whole['budget']}, batch {whole['batch']}, threads {whole['threads']}"
    let_go = " (the wish for speed was let go)" if lifted else ""
    return f"\n{title}{let_go}: {1 / float(str(whole['speedup'])):.1%} of the dense latency\n{told.to_string()}"


def _predictions(
    subject: Subject, stopwatch: Stopwatch, candidates: list[Candidates], count: int
) -> Iterator[dict[str, float]]:
    """Yield predicted and measured parts of the dense latency for random plans, from small ones to large ones.

    Each layer of a plan is a random one of its candidates whose part of the dense layer's latency is within 0.15 of the
    plan's size, the nearest one where there is none.
    """
    generator = np.random.default_rng(0)
    timed = stopwatch.timed(candidates, keep_slower=False)
    for size in np.linspace(0.1, 1.0, count):
        specs: dict[str, SeKronSpec] = {}
        nanoseconds = stopwatch.nanoseconds
        for layer in timed:
            assert layer.latency is not None
            far = np.abs(layer.latency / layer.latency[0] - size)
            index = int(generator.choice(np.flatnonzero(far <= max(0.15, far.min()))))
            nanoseconds -= int(layer.latency[0] - layer.latency[index])
            if (spec := layer.spec(index)) is not None:
                specs[layer.name] = spec
        (timing,) = ks.bench(
            subject.dense,
            random_network(subject.dense, specs),
            input_shape=SHAPE,
            batches=(stopwatch.setting.batch,),
            threads=(stopwatch.setting.threads,),
            seconds=SECONDS / 3,
            layers=False,
        )
        yield {
            "size": float(size),
            "predicted": nanoseconds / stopwatch.nanoseconds,
            "measured": 1 / timing.speedup,
            "low": 1 / timing.speedup_high,
            "high": 1 / timing.speedup_low,
        }


if __name__ == "__main__":
    main()
