"""Factorised layers against tensorly-torch's, hand-written ones and the dense convolution: medians of runs in turns.

    python results/execution-speed/compare.py [SECONDS]

Needs tensorly-torch 0.5. The layers are the 3x3 ones of ResNet-18 at 224 x 224, with the ranks of half the MACs. In
each round every contestant runs once; times are CPU seconds of the one thread, which other programs on the machine
don't add to. The factors are the same wherever both hold them, and the outputs are compared before.
"""

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kronsearch.sekron import SeKronConv2d, SeKronSpec, count_macs
from kronsearch.sekron.convolution import conv_geometry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tltorch

# in channels, out channels, size of the input, stride
SHAPES = ((64, 64, 56, 1), (64, 128, 56, 2), (128, 128, 28, 1), (128, 256, 28, 2), (256, 256, 14, 1), (256, 512, 14, 2))
SHAPES = (*SHAPES, (512, 512, 7, 1))
KINDS: dict[str, Callable[[int, int, int], SeKronSpec]] = {
    "CP": lambda o, c, r: SeKronSpec(((o, 1, 1, 1), (1, 1, 3, 3), (1, c, 1, 1)), (r, 1)),
    "Tucker-2": lambda o, c, r: SeKronSpec(((o, 1, 1, 1), (1, 1, 3, 3), (1, c, 1, 1)), (r, r), "chain"),
    "split": lambda o, c, r: SeKronSpec(((o, 1, 3, 1), (1, c, 1, 3)), (r,)),
}


def half(kind: str, conv: nn.Conv2d, size: int) -> SeKronSpec:
    """Return the largest rank of at most half the MACs."""
    make, geometry = KINDS[kind], conv_geometry(conv)
    target = count_macs(SeKronSpec((tuple(conv.weight.shape),)), geometry, (size, size)) // 2
    rank = 1
    while count_macs(make(*conv.weight.shape[:2], rank + 1), geometry, (size, size)) <= target:
        rank += 1
    return make(*conv.weight.shape[:2], rank)


def by_hand(layer: SeKronConv2d, kind: str, stride: int) -> nn.Sequential:
    """Return the layers that one would write for these factors."""
    rank = layer.spec.ranks[0]
    out, channels = layer.spec.kernel_shape[:2]
    first, *others = (factor.detach() for factor in reversed(list(layer.factors)))
    if kind == "split":
        convs = [
            nn.Conv2d(channels, rank, (1, 3), stride=(1, stride), padding=(0, 1), bias=False),
            nn.Conv2d(rank, out, (3, 1), stride=(stride, 1), padding=(1, 0)),
        ]
        weights = [first.reshape(rank, channels, 1, 3), others[0].reshape(rank, out, 3, 1).transpose(0, 1)]
    else:
        groups = rank if kind == "CP" else 1
        convs = [
            nn.Conv2d(channels, rank, 1, bias=False),
            nn.Conv2d(rank, rank, 3, stride=stride, padding=1, groups=groups, bias=False),
            nn.Conv2d(rank, out, 1),
        ]
        core = others[0].reshape(rank, -1, 3, 3)
        weights = [first.reshape(rank, channels, 1, 1), core, others[1].reshape(rank, out, 1, 1).transpose(0, 1)]
    for conv, weight in zip(convs, weights, strict=True):
        conv.weight.copy_(weight)
    convs[-1].bias.copy_(layer.bias)
    return nn.Sequential(*convs).eval()


def by_tltorch(layer: SeKronConv2d, kind: str, stride: int) -> dict[str, nn.Module]:
    """Return tensorly-torch's layers of the same factors; of the split, which it has not, the nearest ones."""
    rank = layer.spec.ranks[0]
    out, channels = layer.spec.kernel_shape[:2]

    def make(factorization: str, ranks: object, implementation: str) -> nn.Module:
        made = tltorch.FactorizedConv(
            channels, out, (3, 3), stride=stride, padding=1, bias=True, factorization=factorization, rank=ranks,
            implementation=implementation,
        )  # fmt: skip
        made.bias.copy_(layer.bias)
        return made.eval()

    if kind == "split":  # a train C, 3, 3, F with R in the middle: exact, its outer ranks being full
        exact = (1, min(channels, 3 * rank), rank, min(out, 3 * rank), 1)
        made = {"tt": make("tt", exact, "factorized"), "rebuilt": make("tt", exact, "reconstructed")}
        for module in made.values():
            for parameter in module.weight.parameters():
                parameter.normal_(0, 0.1)
        return made
    last, middle, first = (layer.factors[k].detach() for k in (0, 1, 2))
    if kind == "CP":
        made = {name: make("cp", rank, name) for name in ("factorized", "mobilenet")}
        for module in made.values():
            height, width = layer.spatial  # type: ignore[attr-defined]
            module.weight.weights.fill_(1)
            columns = (last.reshape(rank, out).T, first.reshape(rank, channels).T, height.T, width.T)
            for factor, column in zip(module.weight.factors, columns, strict=True):
                factor.copy_(column)
        return made
    made = {"factorized": make("tucker", (rank, rank, 3, 3), "factorized")}
    weight = made["factorized"].weight
    weight.core.copy_(middle.reshape(rank, rank, 3, 3))
    for factor, column in zip(
        weight.factors, (last.reshape(rank, out).T, first.reshape(rank, channels).T), strict=False
    ):
        factor.copy_(column)
    weight.factors[2].copy_(torch.eye(3))
    weight.factors[3].copy_(torch.eye(3))
    return made


def medians(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each, which take turns for so long."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in (*runs.values(), *runs.values()):
        run()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            before = time.thread_time()
            run()
            times[name].append(time.thread_time() - before)
    return {name: 1e3 * statistics.median(own) for name, own in times.items()}


def measure(kind: str, shape: tuple[int, int, int, int], seconds: float) -> list[tuple[int, str, dict[str, float]]]:
    channels, out, size, stride = shape
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1).eval()
    layer = SeKronConv2d(half(kind, conv, size), conv_geometry(conv)).eval()
    for parameter in layer.parameters():
        parameter.normal_(0, 0.1)
    if kind == "CP":  # tensorly-torch's terms have an extent of rank one
        layer.spatial = torch.randn(2, layer.spec.ranks[0], 3)  # type: ignore[assignment]
        layer.factors[1].copy_(
            (layer.spatial[0, :, :, None] * layer.spatial[1, :, None]).reshape(layer.factors[1].shape)
        )
    hand, theirs = by_hand(layer, kind, stride), by_tltorch(layer, kind, stride)
    found = []
    for batch in (1, 8):
        for last in (False, True):
            form = torch.channels_last if last else torch.contiguous_format
            data = torch.randn(batch, channels, size, size).contiguous(memory_format=form)
            dense, written = (copy.deepcopy(module).to(memory_format=form) for module in (conv, hand))
            models: dict[str, nn.Module] = {"ours": layer, "dense": dense, "hand": written, **theirs}
            expected = layer(data)
            for name in models.keys() - {"dense", "tt", "rebuilt"}:
                torch.testing.assert_close(models[name](data), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))

            def run(model: nn.Module, data: Tensor = data) -> Callable[[], Tensor]:
                return lambda: model(data)

            times = medians({name: run(model) for name, model in models.items()}, seconds)
            found.append((batch, "channels_last" if last else "contiguous", times))
    return found


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios: dict[tuple[str, int, str, str], list[float]] = {}
    with torch.no_grad():
        made = [(kind, shape, measure(kind, shape, seconds)) for kind in KINDS for shape in SHAPES]
    print("| kind | layer | batch | layout | " + "ours, ms | others, ms |\n|---|---|---|---|---|---|")
    for kind, (channels, out, size, stride), rows in made:
        for batch, layout, times in rows:
            others = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items() if name != "ours")
            print(
                f"| {kind} | {channels} to {out}, {size}/{stride} | {batch} | {layout} "
                f"| {times['ours']:.2f} | {others} |"
            )
            for name, ms in times.items():
                ratios.setdefault((kind, batch, layout, name), []).append(ms / times["ours"])
    print("\n| kind | batch | layout | against | median of time / ours | least |\n|---|---|---|---|---|---|")
    for (kind, batch, layout, name), values in ratios.items():
        if name != "ours":
            print(f"| {kind} | {batch} | {layout} | {name} | {statistics.median(values):.2f} | {min(values):.2f} |")
    for kind, name in dict.fromkeys((kind, name) for kind, _, _, name in ratios if name != "ours"):
        every = [ratio for key, values in ratios.items() if (key[0], key[3]) == (kind, name) for ratio in values]
        print(f"| {kind} | both | both | {name} | {statistics.median(every):.2f} | {min(every):.2f} |")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
