"""How much layers matter in the network of the plain plan, beside what each of them does alone."""

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kronsearch.models.apply import replace_layers, stream
from kronsearch.models.shelf import Shelf
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.score import Scorer
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.training.batchnorm import batch_statistics
from kronsearch.training.data import train_inputs
from kronsearch.training.distillation import softened_divergence
from kronsearch.training.precision import forward, precision_for
from kronsearch.training.schedule import TEMPERATURE

__all__ = ["Context", "contributions"]

_ROUNDS = 2  # in which importances are led to what layers were found to contribute
_STEP = 0.4  # of that way, in logarithms, in a round: a candidate's contribution is as much its own as its layer's
_LEAST = 0.05  # contribution of a layer, as a part of the mean: below that it is noise, and may be negative
_IMAGES = (64, 2_048)  # the fewest and the most that a network is run on
_BATCH = 64
_WORK = 16 * 10**12  # MACs of a round, as far as the fewest images allow
_RUNS = 4  # forward passes that one of the dense network and one forward and backward of the other come to
_CONTEXT = 31  # stream of random numbers


@dataclass(frozen=True)
class Context:
    """Measures how much layers matter in context.

    Args:
        scorer: builds networks of plans, and knows the dense one and its data.
        macs: of one example.
        origin: what the metrics of layers depend on.
        shelf: where contributions are kept.
        tell: is called with the number of rounds done and of all.
    """

    scorer: Scorer
    macs: int
    origin: Mapping[str, Any]
    shelf: Shelf
    tell: Callable[[int, int], None]

    def known(self, problem: Problem) -> Problem:
        """Return the problem with how much more layers matter in context than alone.

        Twice the layers' contributions to the divergence of a network are measured, first of the plain plan's, and
        their importances go a part of the way to where an allocation would have expected just these.
        """
        for done in range(_ROUNDS):
            self.tell(done, _ROUNDS)
            allocation = problem.allocate(Weighing(context=1.0))
            found = self._contributions(problem, allocation.chosen)
            problem = replace(problem, context=_refined(problem, allocation.chosen, found))
        self.tell(_ROUNDS, _ROUNDS)
        return problem

    def _contributions(self, problem: Problem, chosen: Sequence[int]) -> dict[str, float]:
        """Return what the layers of these candidates contribute, from the shelf if it was measured before."""
        specs = {
            layer.name: spec
            for layer, index in zip(problem.candidates, chosen, strict=True)
            if (spec := layer.spec(index)) is not None
        }
        images = min(max(_WORK // max(1, _RUNS * self.macs), _IMAGES[0]), _IMAGES[1])
        settings = self.scorer.settings
        plan = hashlib.sha256(repr(sorted(specs.items())).encode()).hexdigest()
        key = {**self.origin, "plan": plan, "runs on": images, "batch norms": settings.batchnorm_images}
        kept = self.shelf.get("context", key)
        if kept is not None and set(kept) == set(specs) and all(found.numel() == 1 for found in kept.values()):
            return {name: float(found) for name, found in kept.items()}
        generator = stream(settings.seed, _CONTEXT)
        found = contributions(self.scorer, self.scorer.build(specs), images, generator)
        self.shelf.put("context", key, {name: torch.tensor(value).double() for name, value in found.items()})
        return found


def contributions(scorer: Scorer, small: nn.Module, images: int, generator: torch.Generator) -> dict[str, float]:
    """Return what each factorised layer contributes to the divergence of a network from the dense one.

    As far as the divergence D is a quadratic form of the errors of all kernels, it is half the sum over layers of the
    products of its gradient with their errors, ½ Σ ⟨∂D/∂Ŵ_l, Ŵ_l − W_l⟩ (Euler's theorem on homogeneous functions), and
    a layer's term is what it contributes, its share in what pairs of layers do together included. Of ResNet-20 at a
    third of its MACs the terms add up to 0.79 where D is 0.79, at a fifth of its parameters to 2.5 where it is 2.3.
    One pass over the images gives all of them.

    Args:
        scorer: that built the network.
        small: the network.
        images: about how many training images it is run on, augmented as in training; batch norms take their
            statistics from the batch, as the dense network's do then.
        generator: of these images.
    """
    device, task = scorer.device, scorer.data.task
    precision = precision_for(device)
    dense = copy.deepcopy(scorer.dense)
    layers = {
        name: _as_dense(dense.get_submodule(name), layer)
        for name, layer in small.named_modules()
        if isinstance(layer, SeKronLayer)
    }
    network = replace_layers(small, layers).requires_grad_(False)
    kernels = {name: network.get_parameter(f"{name}.weight").requires_grad_() for name in layers}
    gradients = {name: torch.zeros_like(kernel) for name, kernel in kernels.items()}
    seen = 0
    with batch_statistics(network), batch_statistics(dense):
        for batch in train_inputs(scorer.data, min(_BATCH, images), images, generator=generator, device=device):
            with torch.no_grad():
                wanted = forward(dense, batch, precision)
            divergence = softened_divergence(forward(network, batch, precision), wanted, task, TEMPERATURE)
            found: tuple[Tensor, ...] = torch.autograd.grad(divergence * len(batch), list(kernels.values()))
            for gradient, own in zip(gradients.values(), found, strict=True):
                gradient += own
            seen += len(batch)
    with torch.no_grad():
        errors = {name: kernel - dense.get_parameter(f"{name}.weight") for name, kernel in kernels.items()}
    return {name: float((gradients[name] * error).sum()) / (2 * seen) for name, error in errors.items()}


def _as_dense(layer: nn.Module, factorised: SeKronLayer) -> nn.Module:
    """Return a dense layer with the kernel and the bias of a factorised one."""
    made = copy.deepcopy(layer)
    made.register_parameter("weight", nn.Parameter(factorised.kernel.detach().clone()))
    made.register_parameter("bias", factorised.bias)
    return made


def _refined(problem: Problem, chosen: Sequence[int], found: Mapping[str, float]) -> dict[str, float]:
    """Return the logarithmic importances of layers in context, a step nearer to what was found of these candidates.

    Layers that are dense, exact, or of a contribution that isn't finite stay as they were.
    """
    known = {name: value for name, value in found.items() if math.isfinite(value)}
    if not known:
        return dict(problem.context)
    least = max(_LEAST * sum(map(abs, known.values())) / len(known), 1e-30)
    off = {}
    for layer, index in zip(problem.candidates, chosen, strict=True):
        expected = problem.weighed(layer, Weighing(context=1.0))[index]
        if layer.name in known and expected > 0:
            off[layer.name] = math.log(max(known[layer.name], least) / expected)
    usual = statistics.median(off.values()) if off else 0.0
    return dict(problem.context) | {
        name: problem.context.get(name, 0.0) + _STEP * (ratio - usual) for name, ratio in off.items()
    }
