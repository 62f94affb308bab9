"""What decompositions keep without any training: test accuracy of ResNet-32 on CIFAR-10 after batch-norm re-estimation.

python table.py WEIGHTS CIFAR10_DIR

For each budget and each way to decompose: error tables, one plain allocation, factors, batch norms re-estimated on 2048
training images, the whole test split read once in float32. Prints one JSON line for each.
"""

import json
import sys
import time

import kronsearch as ks
from kronsearch.models.apply import settle
from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.shelf import Shelf
from kronsearch.plan import Decomposition
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.prepare import Prepared, measure, tabulate
from kronsearch.search.reach import replaceable
from kronsearch.search.sensitivity import estimated
from kronsearch.search.space import load_space
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.evaluate import evaluate

BUDGETS = ({"flops": "50%"}, {"flops": "33%"}, {"params": "20%"})
WAYS = (("default", True), ("gkpd", True), ("gkpd", False), ("default", False))  # space, data-aware
SETTINGS = Decomposition(calibration_images=512, batchnorm_images=2048, seed=0)
NOT_KEPT = Shelf(None)


def main() -> None:
    weights, folder = sys.argv[1:3]
    model = ks.load_model("zoo:cifar_resnet32", weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    cost = ks.profile_model(model, input_shape=data.input_shape)
    for space_name, aware in WAYS:
        space = load_space(space_name)
        names = replaceable(cost, space)
        started = time.perf_counter()
        prepared = Prepared({}, None)  # without data a layer's error counts by its relative size
        if aware:
            prepared = measure(model, data, names, SETTINGS, shelf=NOT_KEPT, device="cpu")
        candidates = tabulate(model, cost, names, space, prepared, shelf=NOT_KEPT, tell=lambda *_: None)
        sensitivity = estimated("fisher", model, names, prepared.metrics)
        tables = time.perf_counter() - started
        for asked in BUDGETS:
            budget = ks.Budget(**asked)
            limits = budget.limits(dense_macs=cost.macs, dense_params=cost.params)
            problem = Problem(cost, limits, candidates, sensitivity)
            allocation = problem.allocate(Weighing(trust=1.0))
            started = time.perf_counter()
            layers = {}
            for layer, index in zip(candidates, allocation.chosen, strict=True):
                if (spec := layer.spec(index)) is not None:
                    layers[layer.name] = factorise(
                        model.get_submodule(layer.name), spec, prepared.metrics.get(layer.name)
                    )
            small = replace_layers(model, layers)
            fits = time.perf_counter() - started
            settle(small, data, images=SETTINGS.batchnorm_images, seed=SETTINGS.seed, device="cpu")
            measured = ks.profile_model(small, input_shape=data.input_shape)
            assert measured.macs == allocation.costs["macs"]
            assert measured.params == allocation.costs["params"]
            with kernels_formed(small):  # the same outputs, without the slow stages of some structures
                found = evaluate(small, data, "test")
            told = {
                "budget": str(budget),
                "space": space_name,
                "data-aware": aware,
                "macs": measured.macs,
                "params": measured.params,
                "test accuracy": found.metric,
                "n": found.n,
                "seconds of tables": round(tables, 1),
                "seconds of fits": round(fits, 1),
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
