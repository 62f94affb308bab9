"""Which factorised convolutions of a network are trained in stages, the others with their kernels formed."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import SeKronConv
from kronsearch.sekron.planning import StepPrices, plan_training
from kronsearch.sekron.spec import Run
from kronsearch.training.precision import Precision, eval_mode, forward

__all__ = ["AVX2", "PRICES", "step_prices", "training_runs"]

# Of training steps of 3×3 convolutions on one thread (Xeon with AMX): 16 to 512 channels, bottlenecks, separable ones,
# CP. From 64 channels on the model is right to a tenth, but for depthwise ones in bf16, where moving data takes one to
# four times as long as elsewhere, and ten times and more where they are dilated or of three axes.
PRICES: Mapping[Precision, StepPrices] = {
    "bf16": StepPrices(lanes=16, entry=150, depthwise=3, depthwise_slow=27, forming=5),
    "float32": StepPrices(lanes=16, entry=50, depthwise=1, depthwise_slow=1, forming=1),
}
# Of those on an EPYC with AVX2, of 16 to 256 channels: there MACs take longer, and data no longer to move. Ratios of a
# step in stages to one with the kernel formed, 0.23 to 2.39, are right to an eighth (n = 144, root mean square of their
# logarithms); by those above they are wrong by 0.34 (results/execution-speed/stage_prices.py). Dilated depthwise ones
# take 15 times as long, of three axes 50.
AVX2 = StepPrices(lanes=8, entry=15, depthwise=2, depthwise_slow=40, forming=1)


def step_prices(precision: Precision) -> StepPrices:
    """Return the prices of a training step of this precision on this machine's processor."""
    if precision == "float32" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return AVX2
    return PRICES[precision]


def training_runs(model: nn.Module, inputs: Tensor, examples: int, precision: Precision) -> dict[str, Run]:
    """Return the runs of the layers that are expected to be trained faster in stages, by their dotted names.

    What is expected depends on shapes and the kind of processor alone, so that a training does the same when it is
    resumed on the same machine. It was measured on CPUs; on other devices all kernels are formed.

    Args:
        model: the network; it runs once, in eval mode, and is left as it was, as are torch's random numbers.
        inputs: of which the first is run.
        examples: how many a step has.
        precision: of the training.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SeKronConv)}
    if inputs.device.type != "cpu" or not layers:
        return {}
    runs, prices = {}, step_prices(precision)
    for name, positions in _positions(model, layers, inputs[:1], precision).items():
        spec, geometry = layers[name].spec, layers[name].geometry
        run = plan_training(spec, geometry, examples * positions, prices).order
        if len(run) > 1:
            runs[name] = run
    return runs


def _positions(
    model: nn.Module, layers: Mapping[str, SeKronConv], example: Tensor, precision: Precision
) -> Counter[str]:
    """Return how many positions the outputs of layers have, of all calls for an example together."""
    found = Counter[str]()

    def adder(name: str) -> Callable[[SeKronConv, object, Tensor], None]:
        def add(layer: SeKronConv, _: object, output: Tensor) -> None:
            found[name] += output.numel() // layer.spec.kernel_shape[0]

        return add

    with ExitStack() as stack, torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(adder(name)).remove)
        forward(model, example, precision)
    return found
