"""Which sequences of Kronecker factors have the least error: a map of families, costs and norms on ResNet-32.

python map.py WEIGHTS CIFAR10_DIR [LAYER …] > map.jsonl

For each layer, in the plain norm and in the data-aware one (512 training images), at 2, 3, 5 and 10 times fewer of the
layer's own MACs or of its params: the least relative squared error of each family below. MACs are those of the run that
the planner chooses. Sequences are screened by short fits, the ten best of a family are then fitted to the end.
Data-aware errors are told three times: in the norm that the fit takes place in, which every sequence approximates in
its own way; in the whole moments, which are the same for all; and there again after the engine's refit of the two best.
Quotients divide by the best two factors of the same line. Prints a JSON line for each finding, then the medians over
the layers.
"""

import itertools
import json
import random
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

import kronsearch as ks
from kronsearch.models.apply import calibrate
from kronsearch.sekron import (
    Metric,
    SeKronSpec,
    chain_table,
    count_macs,
    dense_macs,
    factor_pairs,
    pair_tables,
    plan_run,
)
from kronsearch.sekron.chain import fit_chain
from kronsearch.sekron.contraction import contract
from kronsearch.sekron.execution import Geometry
from kronsearch.sekron.fit import fit, grow
from kronsearch.sekron.refit import refit
from kronsearch.sekron.shapes import FactorShapes, divisors
from kronsearch.sekron.svd import recursive_svd
from kronsearch.sekron.tensors import (
    as_factors,
    as_matrices,
    balanced_factors,
    leaves,
    reconstruct,
    unfold_kernel,
)

LAYERS = ("layer1.2.conv2", "layer2.2.conv1", "layer3.2.conv1")
SETTINGS = [(cost, part) for cost in ("macs", "params") for part in (2, 3, 5, 10)]
IMAGES, SEED = 512, 0
SHORT, FINISHED, REFITTED = 15, 10, 2  # sweeps of a screening fit; of each family and setting
SAMPLED = {16: 300, 32: 200, 64: 100}  # sequences of three factors and of four, by out channels; a third for trees
INNER = (2, 3, 4, 9, 16)  # R_2 of trees on whole modes

Seed = tuple[FactorShapes, tuple[int, ...]]  # a sequence and (R_2, …); R_1 is what the budget allows
Setting = tuple[str, int]


@dataclass
class Layer:
    name: str
    kernel: Tensor
    geometry: Geometry
    size: tuple[int, ...]
    metric: Metric | None

    def tensor(self, shapes: FactorShapes) -> Tensor:
        tensor = unfold_kernel(self.kernel, shapes)
        return tensor if self.metric is None else self.metric.weight(tensor, shapes)

    def planned(self, spec: SeKronSpec) -> SeKronSpec:
        """Return a spec with its run of fewest MACs; a tree's is the one at R_1 = 1, as in a search."""
        if spec.coupling == "chain":
            return plan_run(spec, self.geometry, [self.size])
        unit = plan_run(replace(spec, ranks=(1, *spec.ranks[1:])), self.geometry, [self.size])
        return replace(spec, run=unit.run)

    def cost(self, spec: SeKronSpec, cost: str) -> int:
        return count_macs(self.planned(spec), self.geometry, self.size) if cost == "macs" else spec.params

    def limit(self, setting: Setting) -> int:
        shape = tuple(self.kernel.shape)
        dense = dense_macs(shape, self.geometry, self.size) if setting[0] == "macs" else prod(shape)
        return dense // setting[1]

    def highest(self, seed: Seed, setting: Setting) -> int:
        """Return the highest R_1 within a budget: both costs grow in proportion to it, unless all factors merge."""
        unit = SeKronSpec(seed[0], (1, *seed[1]))
        return self.limit(setting) // self.cost(unit, setting[0])

    def whole_error(self, factors: Sequence[Tensor], spec: SeKronSpec) -> float:
        assert self.metric is not None
        return self.metric.energy(self.kernel - reconstruct(factors, spec)) / self.metric.energy(self.kernel)


@dataclass
class Fitted:
    spec: SeKronSpec
    error: float  # in the norm of the fit
    terms: float  # the terms' squared norms, relative to the tensor's
    factors: tuple[Tensor, ...]
    whole: float | None = None
    refitted: float | None = None


def splits(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ordered factorisations."""
    if parts == 1:
        return [(number,)]
    return [(d, *rest) for d in divisors(number) for rest in splits(number // d, parts - 1)]


def from_modes(modes: Iterable[Sequence[int]]) -> FactorShapes:
    return tuple(zip(*modes, strict=True))


def is_sequence(shapes: FactorShapes) -> bool:
    return all(prod(shape) > 1 for shape in shapes)


def whole_modes(shape: tuple[int, ...], length: int) -> list[FactorShapes]:
    """All sequences that leave every mode whole."""
    places = itertools.product(range(length), repeat=len(shape))
    found = (
        from_modes([[n if k == at else 1 for k in range(length)] for n, at in zip(shape, p, strict=True)])
        for p in places
    )
    return [shapes for shapes in found if is_sequence(shapes)]


def neighbours(shapes: FactorShapes) -> Iterator[FactorShapes]:
    """All sequences that differ by one prime factor of one mode."""
    modes = [list(mode) for mode in zip(*shapes, strict=True)]
    for mode in modes:
        for i, j in itertools.permutations(range(len(mode)), 2):
            if mode[i] > 1:
                before, prime = list(mode), divisors(mode[i])[1]
                mode[i], mode[j] = mode[i] // prime, mode[j] * prime
                if is_sequence(found := from_modes(modes)):
                    yield found
                mode[:] = before


def refinements(shapes: FactorShapes) -> Iterator[FactorShapes]:
    """All sequences of one factor more, which divide one of these."""
    for k, shape in enumerate(shapes):
        for pair in factor_pairs(shape):
            yield (*shapes[:k], *pair, *shapes[k + 1 :])


def sampled(shape: tuple[int, ...], length: int, count: int, rng: random.Random) -> list[FactorShapes]:
    choices = [splits(n, length) for n in shape]
    found: dict[FactorShapes, None] = {}
    while len(found) < count:
        if is_sequence(shapes := from_modes([rng.choice(choice) for choice in choices])):
            found[shapes] = None
    return list(found)


def families(shape: tuple[int, ...]) -> dict[str, list[Seed]]:
    """Return the trees of each family but their R_1."""
    rng = random.Random(SEED)
    count = SAMPLED[shape[0]]
    f, c, h, w = shape
    cp = list(itertools.permutations(((f, 1, 1, 1), (1, 1, h, w), (1, c, 1, 1))))
    whole3, cp4 = whole_modes(shape, 3), whole_modes(shape, 4)
    other3 = [shapes for shapes in whole3 if shapes not in cp]
    drawn3, drawn4 = sampled(shape, 3, count, rng), sampled(shape, 4, count, rng)
    near3 = [shapes for order in cp for shapes in neighbours(order)]
    near4 = [*neighbours(next(s for s in cp4 if s[0][0] == f and s[3][1] == c)), *refinements(cp[0])]
    pools: dict[str, list[Seed]] = {
        "3, CP on F|K|C": [(shapes, (1,)) for shapes in cp],
        "3, (R,1), other whole modes": [(shapes, (1,)) for shapes in other3],
        "3, (R,1), split modes": [(s, (1,)) for s in dict.fromkeys([*near3, *drawn3]) if s not in whole3],
        "3, R_2 > 1, F|K|C": [(shapes, (inner,)) for shapes in cp for inner in INNER],
        "3, R_2 > 1, others": [
            (shapes, (inner,)) for shapes in dict.fromkeys([*other3, *drawn3[: count // 3]]) for inner in (2, 4)
        ],
        "4, CP on F|H|W|C": [(shapes, (1, 1)) for shapes in cp4],
        "4, (R,1,1), others": [(s, (1, 1)) for s in dict.fromkeys([*near4, *drawn4]) if s not in cp4],
        "4, R_2 or R_3 > 1": [(shapes, inner) for shapes in cp4 for inner in ((2, 1), (3, 1), (1, 2))],
    }
    return {name: [seed for seed in pool if useful(seed)] for name, pool in pools.items()}


def useful(seed: Seed) -> bool:
    """Tell whether no inner rank is above what its node can have."""
    sizes = [prod(shape) for shape in seed[0]]
    return all(
        rank <= min(sizes[k], prod(sizes[k + 1 :])) and not (rank > 1 and sizes[k] == 1)
        for k, rank in enumerate(seed[1], start=1)
    )


def screen(layer: Layer, seed: Seed, ranks: Iterable[int]) -> dict[int, float]:
    """Return the errors of short fits at several R_1; those of CP-like sums start from one another."""
    tensor = layer.tensor(seed[0])
    errors: dict[int, float] = {}
    matrices: list[Tensor] | None = None
    for rank in sorted(ranks):
        full = (rank, *seed[1])
        if prod(seed[1]) > 1:
            errors[rank] = fit(tensor, full, sweeps=SHORT)[1]
        else:
            start = None if matrices is None else grow(tensor, matrices, rank)
            matrices, errors[rank] = fit(tensor, full, start=start, sweeps=SHORT)
    return errors


def finish(layer: Layer, spec: SeKronSpec, cache: dict[SeKronSpec, Fitted]) -> Fitted:
    if spec not in cache:
        tensor, terms = layer.tensor(spec.factor_shapes), 1.0
        if spec.coupling == "chain":
            matrices, error = fit_chain(tensor, spec.ranks)
        elif spec.sequence_length == 2:
            matrices = recursive_svd(tensor, spec.ranks)
            error = float((tensor - contract(matrices, spec.ranks)).square().sum() / tensor.square().sum())
        else:
            matrices, error = fit(tensor, spec.ranks)
            norms = torch.stack([column.square().sum(1) for column in leaves(matrices, spec.ranks)])
            terms = float(norms.prod(0).sum() / tensor.square().sum())
        if layer.metric is not None:
            matrices = layer.metric.unweight(matrices, spec.factor_shapes)
        cache[spec] = Fitted(spec, error, terms, balanced_factors(matrices, spec))
        if layer.metric is not None:
            cache[spec].whole = layer.whole_error(cache[spec].factors, spec)
    return cache[spec]


def refitted(layer: Layer, fitted: Fitted) -> float:
    assert layer.metric is not None
    if fitted.refitted is None:
        matrices = refit(layer.kernel, as_matrices(fitted.factors, fitted.spec), fitted.spec, layer.metric)
        fitted.refitted = layer.whole_error(as_factors(matrices, fitted.spec), fitted.spec)
    return fitted.refitted


def pairs(layer: Layer) -> dict[Setting, list[tuple[float, SeKronSpec]]]:
    """Return the errors of all sequences of two factors at the highest rank of each setting."""
    found: dict[Setting, list[tuple[float, SeKronSpec]]] = {setting: [] for setting in SETTINGS}
    for table in pair_tables(layer.kernel, list(factor_pairs(tuple(layer.kernel.shape))), metric=layer.metric):
        for setting in SETTINGS:
            rank = min(layer.highest((table.factor_shapes, ()), setting), len(table.errors))
            if rank > 0:
                found[setting].append((float(table.errors[rank - 1]), SeKronSpec(table.factor_shapes, (rank,))))
    return found


def chains(layer: Layer) -> dict[Setting, list[tuple[float, SeKronSpec]]]:
    """Return the errors of the truncated SVDs of chains on F|K|C, at each R_1 with the highest R_2 of each setting."""
    f, c, *extent = layer.kernel.shape
    found: dict[Setting, list[tuple[float, SeKronSpec]]] = {setting: [] for setting in SETTINGS}
    for shapes in itertools.permutations(((f, 1, 1, 1), (1, 1, *extent), (1, c, 1, 1))):
        table = chain_table(layer.kernel, shapes, metric=layer.metric)
        errors = {tuple(pair): error for pair, error in zip(table.ranks.tolist(), table.errors.tolist(), strict=True)}
        most = {first: max(b for a, b in errors if a == first) for first in {a for a, _ in errors}}
        for setting, first in itertools.product(SETTINGS, most):
            specs = [SeKronSpec(shapes, (first, second), "chain") for second in range(1, most[first] + 1)]
            within = bisect_right(specs, layer.limit(setting), key=lambda spec: layer.cost(spec, setting[0]))
            if within > 0:
                found[setting].append((errors[first, within], specs[within - 1]))
    return found


def trees(layer: Layer, pool: Iterable[Seed]) -> dict[Setting, list[tuple[float, SeKronSpec]]]:
    found: dict[Setting, list[tuple[float, SeKronSpec]]] = {setting: [] for setting in SETTINGS}
    for seed in pool:
        ranks = {setting: layer.highest(seed, setting) for setting in SETTINGS}
        errors = screen(layer, seed, {rank for rank in ranks.values() if rank > 0})
        for setting, rank in ranks.items():
            if rank > 0:
                found[setting].append((errors[rank], SeKronSpec(seed[0], (rank, *seed[1]))))
    return found


def best(layer: Layer, screened: list[tuple[float, SeKronSpec]], cache: dict[SeKronSpec, Fitted]) -> dict[str, object]:
    """Finish the best of what was screened at one setting and tell the least errors."""
    ahead = sorted(screened, key=lambda entry: entry[0])[:FINISHED]
    fits = [finish(layer, spec, cache) for _, spec in ahead]
    lowest = min(fits, key=lambda one: one.error)
    macs, params = dense_macs(layer.kernel.shape, layer.geometry, layer.size), layer.kernel.numel()
    told: dict[str, object] = {
        "screened": len(screened),
        "spec": str(layer.planned(lowest.spec)),
        "macs": round(layer.cost(lowest.spec, "macs") / macs, 4),
        "params": round(lowest.spec.params / params, 4),
        "spread": round(max(one.error for one in fits) / lowest.error, 4),
        "terms": round(max(one.terms for one in fits), 1),
        # of the finished, those whose short fit was lower than their long one
        "worse than screened": sum(one.error > 1.01 * error for one, (error, _) in zip(fits, ahead, strict=True)),
        "error": lowest.error,
    }
    if layer.metric is not None:
        order = sorted(fits, key=lambda one: one.whole or 0.0)
        last = min(order[:REFITTED], key=lambda one: refitted(layer, one))
        told |= {"whole": order[0].whole, "refitted": last.refitted, "spec refitted": str(layer.planned(last.spec))}
    return told


def main() -> None:
    weights, folder, *names = sys.argv[1:]
    names = names or list(LAYERS)
    model = ks.load_model("zoo:cifar_resnet32", weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=SEED)
    cost = ks.profile_model(model, input_shape=data.input_shape)
    metrics = calibrate(model, data, names, images=IMAGES, seed=SEED, device="cpu")
    quotients: dict[tuple[str, ...], list[float]] = {}
    for name, aware in itertools.product(names, (False, True)):
        profile = cost.layer(name)
        assert profile.geometry is not None
        kernel = model.get_parameter(f"{name}.weight").detach().double()
        layer = Layer(name, kernel, profile.geometry, tuple(profile.calls[0]), metrics[name] if aware else None)
        norm, cache = "data-aware" if aware else "plain", dict[SeKronSpec, Fitted]()
        reference: dict[Setting, dict[str, object]] = {}
        pools = families(tuple(kernel.shape))
        for family in ("2, the best of all", *pools, "3, chain on F|K|C"):
            started = time.perf_counter()
            if family in pools:
                screened = trees(layer, pools[family])
            else:
                screened = pairs(layer) if family.startswith("2") else chains(layer)
            for setting in SETTINGS:
                if not screened[setting]:
                    continue
                told = best(layer, screened[setting], cache)
                reference.setdefault(setting, told)
                for kind in ("error", "whole", "refitted"):
                    if kind in told:
                        value, of = told[kind], reference[setting][kind]
                        assert isinstance(value, float)
                        assert isinstance(of, float)
                        told[kind], told[f"{kind} of two"] = round(value, 8), round(value / of, 4)
                        key = (norm, kind, setting[0], f"{setting[1]}x", family)
                        quotients.setdefault(key, []).append(value / of)
                where = {"layer": name, "norm": norm, "cost": setting[0], "fewer": setting[1], "family": family}
                print(json.dumps(where | told), flush=True)
            print(f"{name} {norm} {family}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    for (norm, kind, *at), found in sorted(quotients.items()):
        print(
            json.dumps({"median of two": [norm, kind, *at], "n": len(found), "is": round(statistics.median(found), 3)})
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
