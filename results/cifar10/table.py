"""What compressed networks are worth on the test split: one line each.

python table.py WEIGHTS CIFAR10_DIR FILE...: each FILE is a compressed.safetensors of the network that has the weights.
Prints MACs and params with their part of the dense network's, test accuracy (n = 10,000; the standard error of a single
figure is 0.27 points at 92 %), and the divergence from the dense network on the test split.
"""

import sys

import kronsearch as ks
from kronsearch.models.apply import load_compressed, stored_plan
from kronsearch.training.evaluate import evaluate, outputs


def main(weights: str, folder: str, files: list[str]) -> None:
    """Evaluate each in float32."""
    plan = stored_plan(files[0])
    model, data = ks.load_model(plan.model.spec, weights=weights), ks.load_data(f"cifar10:{folder}", seed=0)
    wanted = outputs(model, data, "test")
    print(f"dense: {evaluate(model, data, 'test').metric:.2%}")
    for file in files:
        plan = stored_plan(file)
        found = evaluate(load_compressed(model, file), data, "test", teacher_outputs=wanted)
        macs, params, dense = plan.compressed.macs, plan.compressed.params, plan.dense
        print(
            f"{file}: {macs / 1e6:.2f} M MACs ({macs / dense.macs:.1%}), {params / 1e3:.1f} k params "
            f"({params / dense.params:.1%}), test {found.metric:.2%}, divergence {found.divergence:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
