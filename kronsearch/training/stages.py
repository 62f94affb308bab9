"""Which factorised convolutions of a network are trained in stages, the others with their kernels formed."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from kronsearch.sekron.convolution import SeKronConv
from kronsearch.sekron.planning import Effort, plan_training
from kronsearch.sekron.spec import Run
from kronsearch.training.blocks import recorded_outputs
from kronsearch.training.precision import Precision, eval_mode, forward

__all__ = ["EFFORTS", "training_runs"]

# Of training steps of 3×3 convolutions on one thread (Xeon with AMX): 16 to 512 channels, bottlenecks, separable ones,
# CP. From 64 channels on the model is right to a tenth, but for depthwise ones in bf16, where moving data takes one to
# four times as long as elsewhere.
EFFORTS: Mapping[Precision, Effort] = {"bf16": Effort(150, 3, 5), "float32": Effort(50, 1, 1)}


def training_runs(model: nn.Module, inputs: Tensor, precision: Precision) -> dict[str, Run]:
    """Return the runs of the layers that are expected to be trained faster in stages, by their dotted names.

    What is expected depends on shapes alone, so that a training does the same when it is resumed. It was measured on
    CPUs; on other devices all kernels are formed.

    Args:
        model: the network; it runs once on the first example, in eval mode.
        inputs: a batch as it is trained on.
        precision: of the training.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SeKronConv)}
    if inputs.device.type != "cpu" or not layers:
        return {}
    with torch.no_grad(), eval_mode(model), recorded_outputs(model, layers) as outputs:
        forward(model, inputs[:1], precision)
    runs = {}
    for name, output in outputs.items():
        layer = layers[name]
        positions = len(inputs) * prod(output.shape[2:])
        run = plan_training(layer.spec, layer.geometry, positions, EFFORTS[precision]).order
        if len(run) > 1:
            runs[name] = run
    return runs
