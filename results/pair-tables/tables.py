"""Time the exact error tables of all sequences of two factors of a network, and check random entries.

python tables.py MODEL [WEIGHTS]
"""

import json
import random
import sys
import time

import kronsearch as ks
from kronsearch.models.loading import default_input_shape
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.reach import replaceable
from kronsearch.sekron import decompose, relative_error


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
    generator, worst = random.Random(0), 0.0
    entries = [(table, index) for table in tables for index in range(1, len(table))]
    for table, index in generator.sample(entries, 100):
        kernel = model.get_parameter(f"{table.name}.weight").detach().double()
        chosen = table.spec(index)
        error = relative_error(kernel, decompose(kernel, chosen), chosen)
        worst = max(worst, abs(table.error[index] ** 0.5 - error) / error)
    told = {
        "model": spec,
        "candidates": len(entries),
        "seconds": round(seconds, 2),
        "entries checked": 100,
        "worst relative difference": worst,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
