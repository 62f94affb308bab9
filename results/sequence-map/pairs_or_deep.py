"""The least squared error of two factors against that of three, jointly fitted, on the 3×3 kernels of ResNet-32.

python pairs_or_deep.py WEIGHTS [PART_OF_THE_MACS]

For each layer, at most that part of its own MACs: the best of all sequences of two factors at any rank (exact), the
sequence (F,1,1,1)(1,1,3,3)(1,C,1,1) with the ranks (R, 1) (CP), and the same as a chain at all pairs of ranks
(Tucker-2). Plain norm, float64. Prints a line for each layer and the medians of the quotients.
"""

import statistics
import sys

import torch

import kronsearch as ks
from kronsearch.sekron import (
    SeKronSpec,
    chain_table,
    count_macs,
    cp_sequence,
    decompose,
    factor_pairs,
    pair_table,
    relative_error,
)


def main() -> None:
    model = ks.load_model("zoo:cifar_resnet32", weights=sys.argv[1])
    part = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    cost = ks.profile_model(model, input_shape=(3, 32, 32))
    deep_quotients, chain_quotients = [], []
    for layer in cost.layers:
        shapes = None if layer.kernel_shape is None or len(layer.kernel_shape) < 4 else cp_sequence(layer.kernel_shape)
        if layer.keeps_dense is not None or shapes is None or layer.geometry is None:
            continue
        kernel = model.get_parameter(f"{layer.name}.weight").detach().double()
        limit, size = part * layer.kernel_macs, layer.calls[0]
        pair, pair_error = None, 1.0
        for candidate in factor_pairs(tuple(kernel.shape)):
            unit = count_macs(SeKronSpec(candidate, (1,)), layer.geometry, size)
            if unit <= limit:
                errors = pair_table(kernel, candidate).errors
                rank = min(int(limit // unit), len(errors))
                if errors[rank - 1] < pair_error:
                    pair, pair_error = SeKronSpec(candidate, (rank,)), float(errors[rank - 1])
        unit = count_macs(SeKronSpec(shapes, (1, 1)), layer.geometry, size)
        deep = SeKronSpec(shapes, (int(limit // unit), 1))
        deep_error = relative_error(kernel, decompose(kernel, deep), deep) ** 2
        chain, chain_error = None, 1.0
        table = chain_table(kernel, shapes)
        for ranks, error in zip(table.ranks.tolist(), table.errors.tolist(), strict=True):
            if error < chain_error:
                spec = SeKronSpec(shapes, tuple(ranks), "chain")
                if count_macs(spec, layer.geometry, size) <= limit:
                    chain, chain_error = spec, error
        if chain is not None:
            chain_error = relative_error(kernel, decompose(kernel, chain), chain) ** 2
        deep_quotients.append(deep_error / pair_error)
        chain_quotients.append(chain_error / pair_error)
        print(
            f"{layer.name}: {pair} {pair_error:.4f} | {deep} {deep_error:.4f} ({deep_quotients[-1]:.2f}) | "
            f"{chain} {chain_error:.4f} ({chain_quotients[-1]:.2f})",
            flush=True,
        )
    print(
        f"median of {len(deep_quotients)} layers at {part:.0%} of the MACs: three factors (CP) "
        f"{statistics.median(deep_quotients):.3f} of the best two, a chain {statistics.median(chain_quotients):.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
