"""Uniform-rank CP at the MACs of a plan, or the plan itself, with the fine-tune that the search gives its winner.

python baseline.py PLAN WEIGHTS CIFAR10_DIR [plain|data-aware|plan] [EPOCHS [SEED]]

Every 3×3 convolution but the first becomes 1×1 → depthwise → 1×1 with the rank that leaves it the same part of its
MACs; that part is the largest that keeps the network within the plan's MACs. Everything else is the search's own code:
joint fits, batch norms re-estimated, the same images in the same order, the same teacher. SEED is the fine-tune's.
"""

import json
import sys
import time

import kronsearch as ks
from kronsearch.finetuning.course import long_settings, new_trainer
from kronsearch.models.apply import calibrate
from kronsearch.plan import Decomposition
from kronsearch.search.score import Scorer
from kronsearch.sekron import SeKronSpec, count_macs, cp_sequence
from kronsearch.training.evaluate import evaluate, outputs


def uniform(cost: ks.ModelCost, macs: int) -> dict[str, SeKronSpec]:
    """Return specs that leave every layer the same part of its MACs, as many as the bound allows."""
    layers = [layer for layer in cost.layers if layer.keeps_dense is None and cp_sequence(layer.kernel_shape)][1:]
    best: dict[str, SeKronSpec] = {}
    for permille in range(1, 1000):
        specs, total = {}, cost.macs
        for layer in layers:
            shapes = cp_sequence(layer.kernel_shape)
            unit = count_macs(SeKronSpec(shapes, (1, 1)), layer.geometry, layer.calls[0])
            rank = max(1, layer.kernel_macs * permille // (1000 * unit))
            specs[layer.name] = SeKronSpec(shapes, (rank, 1))
            total += rank * unit - layer.kernel_macs
        if total > macs:
            break
        best = specs
    return best


def main() -> None:
    plan_file, weights, folder, kind, *rest = [*sys.argv[1:4], *(sys.argv[4:] or ["plain"])]
    epochs, seed = (float(rest[0]) if rest else 2.0), (int(rest[1]) if rest[1:] else 0)
    plan = ks.load_plan(plan_file)
    model = ks.load_model(plan.model.spec, weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    cost = ks.profile_model(model, input_shape=plan.input_shape)
    specs = plan.replaced if kind == "plan" else uniform(cost, plan.compressed.macs)
    settings = Decomposition(calibration_images=512, batchnorm_images=2048, seed=0)
    metrics = {}
    if kind != "plain":
        metrics = calibrate(model, data, list(specs), images=512, seed=0, device="cpu")
    scorer = Scorer(model, data, metrics, settings, "cpu")
    small = scorer.build(specs)
    before = evaluate(small, data, "test")
    started = time.perf_counter()
    if epochs:
        with new_trainer(model, small, specs, data, long_settings(data, epochs=epochs), seed=seed) as trainer:
            trainer.advance(trainer.total_steps)
            small = trainer.result
    after = evaluate(small, data, "test", teacher_outputs=outputs(model, data, "test"))
    measured = ks.profile_model(small, input_shape=plan.input_shape)
    told = {
        "method": "plan" if kind == "plan" else f"uniform-rank CP, {kind}",
        "macs": measured.macs,
        "params": measured.params,
        "test accuracy before fine-tuning": before.metric,
        "test accuracy": after.metric,
        "divergence from the dense network": after.divergence,
        "epochs": epochs,
        "seed": seed,
        "fine-tune seconds": round(time.perf_counter() - started),
        "n": after.n,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
