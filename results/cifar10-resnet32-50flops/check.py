"""Check a compressed network against its plan, and evaluate it.

python check.py OUT WEIGHTS CIFAR10_DIR

Counts its MACs three ways (fvcore, the closed form, torch's own counter halved), layer by layer on convolutions and
linear layers; then reads the test split with the weights in OUT/compressed.safetensors, in float32.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import kronsearch as ks
from kronsearch.models.apply import load_compressed
from kronsearch.sekron import count_macs
from kronsearch.training.evaluate import evaluate


def main() -> None:
    out, weights, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    plan = ks.load_plan(out / "plan.json")
    dense = ks.load_model(plan.model.spec, weights=weights)
    small = load_compressed(dense, out / "compressed.safetensors", plan)
    cost, before = (ks.profile_model(m, input_shape=plan.input_shape) for m in (small, dense))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        small(torch.zeros(1, *plan.input_shape))
    closed = fvcore = 0
    for name, layer in plan.layers.items():
        old = before.layer(name)
        expected = old.kernel_macs if layer.spec is None else count_macs(layer.spec, old.geometry, old.calls[0])
        counted = sum(part.macs for part in cost.layers if part.name == name or part.name.startswith(f"{name}."))
        assert expected == counted, (name, expected, counted)
        closed, fvcore = closed + expected, fvcore + counted
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    told = {
        "convolutions and linear layers, closed form": closed,
        "convolutions and linear layers, fvcore": fvcore,
        "convolutions and linear layers, torch flop_counter / 2": counter.get_total_flops() // 2,
        "fvcore total": cost.macs,
        "budget": plan.budget.max_macs,
        "budget used": round(cost.macs / plan.budget.max_macs, 5),
        "params": cost.params,
        "proven gap": plan.provenance.gap,
        "test accuracy, dense": evaluate(dense, data, "test").metric,
        "test accuracy, compressed": (found := evaluate(small, data, "test")).metric,
        "n": found.n,
    }
    assert closed == fvcore == counter.get_total_flops() // 2
    assert cost.macs <= plan.budget.max_macs
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
