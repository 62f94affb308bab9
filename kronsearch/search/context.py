"""How much layers matter in the network of the plain plan, beside what each of them does alone."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kronsearch.models.factorised import replace_layers
from kronsearch.models.shelf import Shelf
from kronsearch.search.allocate import Allocation
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.effort import affordable
from kronsearch.search.pace import specs_of
from kronsearch.search.score import Scorer
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.batchnorm import batch_statistics
from kronsearch.training.copies import copied
from kronsearch.training.data import train_inputs
from kronsearch.training.distillation import softened_divergence
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import forward, precision_for, shield_gradients
from kronsearch.training.schedule import TEMPERATURE
from kronsearch.training.streams import Purpose, stream

__all__ = ["Context", "contributions"]

_ROUNDS = 2  # in which importances are led to what layers were found to contribute
_STEP = 0.4  # of that way, in logarithms, in a round: a candidate's contribution is as much its own as its layer's
_LEAST = 0.05  # contribution of a layer, as a part of the mean: below that it is noise, and may be negative
_IMAGES = (64, 2_048)  # the fewest and the most that a network is run on
_BATCH = 64
_WORK = 16 * 10**12  # MACs of a round, as far as the fewest images allow
_RUNS = 4  # forward passes that one of the dense network and one forward and backward of the other come to


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
            found = self._contributions(specs_of(problem.candidates, allocation))
            problem = replace(problem, context=_refined(problem, allocation, found))
        self.tell(_ROUNDS, _ROUNDS)
        return problem

    def _contributions(self, specs: Mapping[str, SeKronSpec]) -> dict[str, float]:
        """Return what layers that become these contribute, from the shelf if it was measured before."""
        images = affordable(_RUNS * self.macs, _WORK, *_IMAGES)
        key = {
            **self.origin,
            "specs": repr(sorted(specs.items())),
            "task": self.scorer.data.task.identity,
            "runs on": images,
        }
        kept = self.shelf.get("context", key)
        if kept is not None and set(kept) == set(specs) and all(found.numel() == 1 for found in kept.values()):
            return {name: float(found) for name, found in kept.items()}
        found = contributions(self.scorer, specs, images, stream(self.scorer.settings.seed, Purpose.CONTEXT))
        self.shelf.put(
            "context", key, {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        )
        return found


def contributions(
    scorer: Scorer, specs: Mapping[str, SeKronSpec], images: int, generator: torch.Generator
) -> dict[str, float]:
    """Return what each replaced layer contributes to the divergence of a network from the dense one.

    As far as the divergence D is a quadratic form of the errors of all kernels, it is half the sum over layers of the
    products of its gradient with their errors, ½ Σ ⟨∂D/∂Ŵ_l, Ŵ_l − W_l⟩ (Euler's theorem on homogeneous functions),
    and a layer's term is what it contributes, its share in what pairs of layers do together included. The error of a
    bias that makes up for a change of the mean is a part of it. Of ResNet-20 at a third of its MACs the terms add up to
    0.79 where D is 0.79, at a fifth of its parameters to 2.5 where it is 2.3. One pass over the images gives all.

    Args:
        scorer: factorises layers, and knows the dense network and its data.
        specs: of the layers that are replaced.
        images: about how many training images are run, augmented as in training; batch norms take their statistics from
            the batch, in both networks.
        generator: of these images.
    """
    device, task = scorer.device, scorer.data.task
    precision = precision_for(device)
    dense = copied(scorer.dense)
    layers = {name: _as_dense(dense.get_submodule(name), scorer.layer(name, spec)) for name, spec in specs.items()}
    network = replace_layers(dense, layers).requires_grad_(False)
    shield_gradients(network, precision, torch.device(device))
    changed = [  # of each layer, as in the network and as in the dense one
        (name, ours.requires_grad_(), theirs.detach())
        for name, layer in layers.items()
        for ours, theirs in zip(layer.parameters(), dense.get_submodule(name).parameters(), strict=True)
    ]
    gradients = [torch.zeros_like(ours) for _, ours, _ in changed]
    seen = 0
    with freed_memory_kept(device), batch_statistics(network), batch_statistics(dense):
        for batch in train_inputs(scorer.data, _BATCH, images, generator=generator, device=device):
            with torch.no_grad():
                wanted = forward(dense, batch, precision)
            divergence = softened_divergence(forward(network, batch, precision), wanted, task, TEMPERATURE)
            found: tuple[Tensor, ...] = torch.autograd.grad(
                len(batch) * divergence,
                [ours for _, ours, _ in changed],
                allow_unused=True,  # the output of a layer may not reach that of the network, or not by a gradient
                materialize_grads=True,
            )
            for gradient, own in zip(gradients, found, strict=True):
                gradient += own
            seen += len(batch)
    terms = dict.fromkeys(specs, 0.0)
    with torch.no_grad():
        for (name, ours, theirs), gradient in zip(changed, gradients, strict=True):
            terms[name] += float((gradient * (ours - theirs)).sum()) / (2 * seen)
    return terms


def _as_dense(layer: nn.Module, factorised: SeKronLayer) -> nn.Module:
    """Return a copy of a dense layer with the kernel and the bias of its factorised one."""
    made = copy.deepcopy(layer)
    made.register_parameter("weight", nn.Parameter(factorised.kernel.detach().clone()))
    if factorised.bias is not None:
        made.register_parameter("bias", nn.Parameter(factorised.bias.detach().clone()))
    return made


def _refined(problem: Problem, allocation: Allocation, found: Mapping[str, float]) -> dict[str, float]:
    """Return the logarithmic importances of layers in context, a step nearer to what was found of an allocation.

    Layers that are dense or exact, or of which nothing finite was found, stay as they were, and so do those that are
    expected to contribute next to nothing and do.
    """
    expected = {
        layer.name: float(problem.weighed(layer, Weighing(context=1.0))[index])
        for layer, index in zip(problem.candidates, allocation.chosen, strict=True)
    }
    known = [name for name, value in found.items() if math.isfinite(value) and expected[name] > 0]
    if not known:
        return dict(problem.context)
    usual = statistics.median(found[name] / expected[name] for name in known)
    least = _LEAST * statistics.fmean(abs(found[name]) for name in known)
    if usual <= 0 or least == 0:
        return dict(problem.context)
    return dict(problem.context) | {
        name: problem.context.get(name, 0.0)
        + _STEP * math.log(max(found[name], least) / max(usual * expected[name], least))
        for name in known
    }
