"""A decomposition by hand, at the budget of a plan: one structure for all layers, each left the same part of its own.

python baselines.py gkpd|cp|tucker2|svd PLAN WEIGHTS CIFAR10_DIR OUT

Every convolution of more than one pixel but the first is replaced. That part, of its parameters or of its MACs, is the
largest with which the whole network is within what PLAN was bound to. OUT gets a compressed.safetensors for
`kronsearch finetune`. Nothing is trained; batch norms are re-estimated as the search does.

gkpd      Σ (F/f, C/c, 1, 1) ⊗ (f, c, H, W), or with the extent in the first: of f and c in 2, 4 and 8, the same for all
          layers, the one with the least error in all (Hameed et al., AAAI 2022)
cp        1×1, depthwise, 1×1: fitted jointly (CP)
tucker2   1×1, full, 1×1 with ranks in proportion to the channels: Tucker-2, which is the tensor train of the modes out,
          extent, in
svd       full to R channels, 1×1: the singular value decomposition of the kernel as a matrix (F, C·H·W)
"""

import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import kronsearch as ks
from kronsearch.models.apply import measured, save_compressed
from kronsearch.models.profile import LayerCost
from kronsearch.plan import Decomposition, LayerPlan, Plan, fingerprint
from kronsearch.search.score import Scorer
from kronsearch.sekron import SeKronSpec, count_macs, cp_sequence, decompose, relative_error
from kronsearch.sekron.planning import plan_run
from kronsearch.training.evaluate import evaluate, outputs

Shapes = tuple[tuple[int, ...], ...]


def families(method: str) -> Iterator[Callable[[tuple[int, ...]], Shapes]]:
    """Yield the ways to cut a kernel (F, C, H, W) that a method chooses from."""
    if method in ("cp", "tucker2"):
        yield lambda kernel: cp_sequence(kernel) or ()
    elif method == "svd":
        yield lambda kernel: ((kernel[0], 1, 1, 1), (1, *kernel[1:]))
    else:
        for f, c in ((f, c) for f in (2, 4, 8) for c in (2, 4, 8)):
            yield lambda kernel, f=f, c=c: ((kernel[0] // f, kernel[1] // c, 1, 1), (f, c, *kernel[2:]))
            yield lambda kernel, f=f, c=c: ((kernel[0] // f, kernel[1] // c, *kernel[2:]), (f, c, 1, 1))


def largest(layer: LayerCost, shapes: Shapes, method: str, part: float, *, of_params: bool) -> SeKronSpec:
    """Return the spec of highest rank that costs at most a part of what the dense layer does."""
    kernel, found = layer.kernel_shape, None
    for rank in range(1, 10_000):
        if method == "tucker2":
            ranks = (rank, max(1, round(rank * kernel[1] / kernel[0])))
            if ranks[0] > kernel[0] or ranks[1] > kernel[1]:
                break
            spec = SeKronSpec(shapes, ranks, "chain")
        else:
            spec = SeKronSpec(shapes, (rank, *(1,) * (len(shapes) - 2)))
        spec = plan_run(spec, layer.geometry, layer.calls)
        macs = sum(count_macs(spec, layer.geometry, call) for call in layer.calls)
        cost = spec.params / prod(kernel) if of_params else macs / layer.kernel_macs
        if found is not None and cost > part:
            break
        found = spec
    return found


def uniform(cost: ks.ModelCost, method: str, cut: Callable[..., Shapes], plan: Plan) -> dict[str, SeKronSpec]:
    """Return the specs of all layers, as costly as the bounds of the plan allow, by bisection."""
    layers = [layer for layer in cost.layers if layer.keeps_dense is None and prod((layer.kernel_shape or ())[2:]) > 1]
    of_params = plan.budget.max_params is not None
    low, high, best = 0.0, 1.0, {}
    for _ in range(12):
        part = (low + high) / 2
        specs = {x.name: largest(x, cut(x.kernel_shape), method, part, of_params=of_params) for x in layers[1:]}
        macs = cost.macs - sum(x.kernel_macs for x in layers[1:])
        macs += sum(count_macs(specs[x.name], x.geometry, call) for x in layers[1:] for call in x.calls)
        params = cost.params - sum(prod(x.kernel_shape) - specs[x.name].params for x in layers[1:])
        fits = params <= (plan.budget.max_params or cost.params) and (of_params or macs <= plan.budget.max_macs)
        low, high, best = (part, high, specs) if fits else (low, part, best)
    return best


def error(model, specs: dict[str, SeKronSpec]) -> float:
    """Return the mean relative squared error over layers."""
    kernels = {name: model.get_submodule(name).weight.detach() for name in specs}
    return sum(relative_error(w, decompose(w, specs[name]), specs[name]) for name, w in kernels.items()) / len(specs)


def main() -> None:
    """Decompose, tell what it is worth before any training, and write it."""
    method, plan_file, weights, folder, out = sys.argv[1:]
    plan = ks.load_plan(plan_file)
    model = ks.load_model(plan.model.spec, weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    cost = ks.profile_model(model, input_shape=plan.input_shape)
    choices = [specs for cut in families(method) if (specs := uniform(cost, method, cut, plan))]
    specs = choices[0] if len(choices) == 1 else min(choices, key=lambda specs: error(model, specs))
    settings = Decomposition(calibration_images=0, batchnorm_images=2048, seed=0)
    small = Scorer(model, data, {}, settings, "cpu").build(specs)
    layers = {
        name: LayerPlan(kernel_shape=layer.kernel_shape, spec=specs[name])
        if name in specs
        else LayerPlan(kernel_shape=layer.kernel_shape, dense="the method leaves it as it is")
        for name, layer in plan.layers.items()
    }
    identity = plan.model.model_copy(update={"fingerprint": fingerprint(layers)})
    changed = {"model": identity, "layers": layers, "decomposition": settings, "score": None, "latency": None}
    made = plan.model_copy(update=changed)
    made = measured(made, model, small)
    found = evaluate(small, data, "test", teacher_outputs=outputs(model, data, "test"))
    Path(out).mkdir(parents=True, exist_ok=True)
    save_compressed(small, made, Path(out) / "compressed.safetensors")
    macs, params = made.compressed.macs, made.compressed.params
    print(
        f"{method}: {macs} MACs ({macs / cost.macs:.1%}), {params} params ({params / cost.params:.1%}), test accuracy "
        f"{found.metric:.4f}, divergence {found.divergence:.4f}, the first layer {next(iter(specs.values()))}"
    )


if __name__ == "__main__":
    main()
