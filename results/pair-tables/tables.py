"""Time the exact error tables of all sequences of two factors of a network, and check random entries.

python tables.py MODEL [WEIGHTS]

Without weights they are random, which changes neither time nor memory. Large kernels are tabulated in float32: what is
told is the largest difference of the relative squared errors, and of the relative errors in parts of themselves where
they are above a hundredth.
"""

import json
import random
import resource
import sys
import time

import torch

import kronsearch as ks
from kronsearch.models.loading import default_input_shape
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.reach import replaceable
from kronsearch.sekron import decompose, relative_error

CHECKED = 200


def main() -> None:
    spec, weights = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    model, space = ks.load_model(spec, weights=weights), ks.load_space("gkpd")
    cost = ks.profile_model(model, input_shape=default_input_shape(spec, model))
    started = time.perf_counter()
    tables = [
        layer_candidates(model.get_parameter(f"{name}.weight"), cost.layer(name), space)
        for name in replaceable(cost, space)
    ]
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    generator, squared, relative = random.Random(0), 0.0, 0.0
    entries = [(table, index) for table in tables for index in range(1, len(table))]
    for table, index in generator.sample(entries, CHECKED):
        kernel = model.get_parameter(f"{table.name}.weight").detach().double()
        chosen = table.spec(index)
        error, listed = relative_error(kernel, decompose(kernel, chosen), chosen), float(table.error[index])
        squared = max(squared, abs(listed - error**2))
        if error > 0.01:
            relative = max(relative, abs(listed**0.5 - error) / error)
    told = {
        "model": spec,
        "threads": torch.get_num_threads(),
        "candidates": len(entries),
        "seconds": round(seconds, 2),
        "peak memory, GiB": round(peak, 2),
        "entries checked": CHECKED,
        "largest difference of squared errors": squared,
        "largest relative difference of errors": relative,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
