"""What a trial chooses, and how the allocation makes a plan of it that keeps the budget by construction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp

import numpy as np
from numpy.typing import NDArray

from kronsearch.budget import Limits
from kronsearch.models.profile import LayerCost, ModelCost
from kronsearch.search.allocate import Allocation, Choices, allocate
from kronsearch.search.candidates import Candidates
from kronsearch.sekron.shapes import Structure

__all__ = ["Problem", "Weighing", "group_of"]


@dataclass(frozen=True)
class Weighing:
    """How predicted errors are weighed; the default is the plain allocation.

    A candidate of layer l with relative squared error e counts
    `exp(importance[group of l] + price[structure] + context · c_l) · sensitivity_l^trust · e^curvature`, where `c` is
    the context of the problem.

    Args:
        trust: in the measured sensitivities: 1 takes them as they are, 0 takes all layers for alike; ½ was as good or
            better than both on ResNet-32 at a half and a third of the MACs and a fifth of the params.
        curvature: 1 means that the loss grows in proportion to the squared error.
        importance: logarithmic, of each group of layers.
        price: logarithmic, of each kind of structure.
        context: how far to go with what is known of layers in the network of the plain plan: 1 takes it as it is.
    """

    trust: float = 0.5
    curvature: float = 1.0
    importance: Mapping[str, float] = field(default_factory=dict)
    price: Mapping[Structure, float] = field(default_factory=dict)
    context: float = 0.0


def group_of(layer: LayerCost) -> str:
    """Return the name of the group that shares an importance: layers that see the same number of positions."""
    return f"{layer.kind.lower()}-{'x'.join(map(str, layer.calls[0]))}"


@dataclass(frozen=True)
class Problem:
    """All that is known before the first trial.

    Args:
        cost: the dense network's.
        limits: the budgets in plain numbers; that of latency in the terms of the candidates' latencies.
        candidates: of each replaceable layer.
        sensitivity: of each replaceable layer: what a relative squared error of 1 would cost.
        latency: of the dense network in the terms of the candidates' latencies, None where those have none.
        context: of replaceable layers: how much more they matter in the network of the plain plan, a logarithm.
    """

    cost: ModelCost
    limits: Limits
    candidates: Sequence[Candidates]
    sensitivity: Mapping[str, float]
    latency: int | None = None
    context: Mapping[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The groups of layers that share an importance, in the order of execution."""
        return list(dict.fromkeys(group_of(self.cost.layer(layer.name)) for layer in self.candidates))

    @property
    def structures(self) -> list[Structure]:
        """The kinds of structure that some layer can have."""
        present = {kind for layer in self.candidates for kind in layer.structures()} - {Structure.DENSE}
        return [kind for kind in Structure if kind in present]

    @property
    def dense(self) -> dict[str, int]:
        """What the dense network costs, by the names of `Limits`; the latency where candidates have one."""
        dense = {"macs": self.cost.macs, "params": self.cost.params}
        return dense if self.latency is None else {**dense, "latency": self.latency}

    @property
    def bounds(self) -> Limits:
        """What the allocation keeps: the budgets, and the dense network's cost where there is none."""
        return replace(  # a network that is smaller in one cost is not to grow in the other
            self.limits,
            macs=self.cost.macs if self.limits.macs is None else self.limits.macs,
            params=self.cost.params if self.limits.params is None else self.limits.params,
        )

    def allocate(self, weighing: Weighing) -> Allocation:
        """Return the allocation of least weighed error inside of the bounds.

        Raises:
            BudgetError: the budget can't be reached.
        """
        fixed = {
            name: cost - sum(int(layer.costs[name][0]) for layer in self.candidates)
            for name, cost in self.dense.items()
        }
        choices = [Choices(layer.costs, self.weighed(layer, weighing)) for layer in self.candidates]
        return allocate(choices, self.bounds, fixed=fixed, asked=self.limits)

    def predicted_error(self, chosen: Sequence[int]) -> float:
        """Return the mean relative squared error of the chosen candidates, weighed by sensitivity."""
        weights = [self.sensitivity[layer.name] for layer in self.candidates]
        errors = [float(layer.error[index]) for layer, index in zip(self.candidates, chosen, strict=True)]
        return float(np.dot(weights, errors)) / (sum(weights) or 1.0)

    def weighed(self, layer: Candidates, weighing: Weighing) -> NDArray[np.float64]:
        """Return what each of a layer's candidates counts."""
        importance = weighing.importance.get(group_of(self.cost.layer(layer.name)), 0.0)
        importance += weighing.context * self.context.get(layer.name, 0.0)
        weight = exp(importance) * self.sensitivity[layer.name] ** weighing.trust
        prices = {kind: exp(weighing.price.get(kind, 0.0)) for kind in Structure}
        price = np.array([prices[kind] for kind in layer.structures()])
        return np.asarray(weight * price * layer.error**weighing.curvature)
