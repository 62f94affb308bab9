"""What training steps of single layers take in stages and with their kernels formed, here, and what prices say of it.

    python results/execution-speed/stage_prices.py [--precision float32] [--rounds 7] [--out layers.csv]

One thread, CPU seconds, channels last: each layer's two ways take turns, forming, forward and backward pass, medians.
Printed are a line for each layer and, for the prices of kronsearch/training/stages.py and the best ones of a grid: how
far off ratios of the two are (root mean square of logarithms), and what the layers take on average of the time with
formed kernels, if stages are taken where the prices say so.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kronsearch.sekron.convolution import SeKronConv2d, kernels_formed
from kronsearch.sekron.execution import Geometry
from kronsearch.sekron.planning import StepPrices, plan_training, training_costs
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.precision import KERNELS, Precision, forward
from kronsearch.training.stages import AVX2, PRICES, step_prices

SAME = Geometry((1, 1), (1, 1), ((1, 1), (1, 1)))
SIZES = (  # examples, positions a side, channels in and out
    *((128, 32, 16, 16), (128, 16, 32, 32), (128, 8, 64, 64), (128, 16, 16, 32), (16, 56, 64, 64), (16, 28, 128, 128)),
    *((16, 14, 256, 256), (8, 28, 256, 256), (32, 7, 256, 256)),
)


def specs_of(c: int, f: int, part: float) -> Iterator[tuple[str, SeKronSpec]]:
    """Yield structures of a 3x3 kernel that take about this part of its MACs."""
    macs = part * 9 * c * f
    yield "CP", SeKronSpec(((f, 1, 1, 1), (1, 1, 3, 3), (1, c, 1, 1)), (int(macs / (c + f + 9)), 1))
    yield "separable", SeKronSpec(((f, 1, 1, 3), (1, c, 3, 1)), (int(macs / (3 * c + 3 * f)),))
    yield "narrow behind", SeKronSpec(((f, 1, 1, 1), (1, c, 3, 3)), (int(macs / (9 * c + f)),))
    yield "narrow in front", SeKronSpec(((f, 1, 3, 3), (1, c, 1, 1)), (int(macs / (9 * f + c)),))


def measured(
    spec: SeKronSpec, staged: SeKronSpec, size: tuple[int, ...], precision: Precision, rounds: int
) -> list[float]:
    """Return the milliseconds of a step with the kernel formed, and in stages."""
    examples, side, c, f = size
    model = nn.Sequential(SeKronConv2d(spec, SAME, bias=False))
    with torch.no_grad():
        for factor in model.parameters():
            factor.normal_()
    images = torch.randn(examples, c, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    slope = torch.randn(examples, f, side, side).contiguous(memory_format=torch.channels_last)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for runs, own in zip(({}, {"0": staged.order}), times, strict=True):
            start = time.process_time()
            with kernels_formed(model, KERNELS[precision], runs):
                outputs = forward(model, images, precision)
            outputs.backward(slope)
            own.append(1e3 * (time.process_time() - start))
            for tensor in (images, *model.parameters()):
                tensor.grad = None
    return [statistics.median(own[1:]) for own in times]


def verdict(layers: list[tuple[SeKronSpec, int, float]], prices: StepPrices) -> tuple[float, float]:
    """Return how far off these prices are, and what the layers take by them, of (spec, positions, measured ratio)."""
    errors, takes = [], []
    for spec, positions, ratio in layers:
        formed, *staged = training_costs(spec, SAME, positions, prices).values()
        errors.append(math.log(min(staged) / formed / ratio) ** 2)
        takes.append(ratio if len(plan_training(spec, SAME, positions, prices).order) > 1 else 1.0)
    return math.sqrt(statistics.mean(errors)), statistics.mean(takes)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    precision: Precision = options.precision
    here, rows, layers = step_prices(precision), [], []
    for size, part in product(SIZES, (0.2, 0.35, 0.5, 0.7)):
        examples, side, c, f = size
        positions = examples * side**2
        for name, spec in specs_of(c, f, part):
            (_, formed), *others = training_costs(spec, SAME, positions, here).items()
            planned, staged = min(others, key=lambda each: each[1])
            took = measured(spec, planned, size, precision, options.rounds)
            layers.append((spec, positions, took[1] / took[0]))
            rows.append((*size, name, spec.ranks[0], len(planned.order), *took, took[1] / took[0], staged / formed))
            print(size, name, f"R {spec.ranks[0]}: {took[1] / took[0]:.2f}, expected {staged / formed:.2f}", flush=True)
    if options.out is not None:
        columns = ["examples", "side", "in", "out", "kind", "R", "stages", "formed_ms", "staged_ms"]
        table = pd.DataFrame(rows, columns=[*columns, "ratio", "expected"])
        table.to_csv(options.out, index=False, float_format="%.4g")
    lanes, entries, depthwise, forming = (8, 16), (10, 15, 20, 30, 50, 100, 150), (1, 2, 3), (1, 2, 5)
    grid = [StepPrices(n, e, d, here.depthwise_slow, m) for n, e, d, m in product(lanes, entries, depthwise, forming)]
    best = min(grid, key=lambda prices: verdict(layers, prices))
    for name, prices in {**PRICES, "AVX2": AVX2, "best": best}.items():
        print(f"{name}, {prices}: off by {{:.2f}}, layers take {{:.3f}}".format(*verdict(layers, prices)))
    print(f"the least that they can take {statistics.mean(min(1, ratio) for *_, ratio in layers):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
