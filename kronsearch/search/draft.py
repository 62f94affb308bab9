"""From an allocation to a plan."""

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from kronsearch.budget import Budget
from kronsearch.errors import StudyError, first_line
from kronsearch.models.profile import LayerCost
from kronsearch.plan import (
    Cost,
    Decomposition,
    Latency,
    LayerPlan,
    ModelIdentity,
    Plan,
    PlanBudget,
    Provenance,
    fingerprint,
)
from kronsearch.search.allocate import Allocation
from kronsearch.search.candidates import Candidates
from kronsearch.search.decode import Problem
from kronsearch.search.space import SearchSpace

__all__ = ["Draft"]

_PACKAGES = ("kronsearch", "torch", "optuna", "fvcore", "scipy", "numpy")


@dataclass(frozen=True)
class Draft:
    """What all plans of a search have in common.

    Args:
        space: the search space.
        budget: as the user wrote it.
        decomposition: how kernels become factors.
        seed: of the search.
        model_spec: how the model is called, None for a module of the caller's.
        model_args: what it was constructed with.
    """

    space: SearchSpace
    budget: Budget
    decomposition: Decomposition
    seed: int
    model_spec: str | None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            json.dumps(self.model_args, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StudyError(
                f"the model's arguments can't stand in a plan, which is JSON ({first_line(error)}): leave out those "
                "that are no numbers, texts, or lists and dicts of them"
            ) from error

    def plan(self, problem: Problem, allocation: Allocation, latency: Latency | None = None) -> Plan:
        """Return the plan of an allocation, with what it was measured to take; its score is yet unknown."""
        chosen = {
            layer.name: (layer, index) for layer, index in zip(problem.candidates, allocation.chosen, strict=True)
        }
        layers = {
            layer.name: self._layer(layer, layer.kernel_shape, chosen.get(layer.name))
            for layer in problem.cost.layers
            if layer.kernel_shape is not None
        }
        budget, limits, cost = self.budget, problem.limits, problem.cost
        return Plan(
            model=ModelIdentity(spec=self.model_spec, args=self.model_args, fingerprint=fingerprint(layers)),
            input_shape=cost.input_shape,
            budget=PlanBudget(
                flops=None if budget.flops is None else str(budget.flops),
                params=None if budget.params is None else str(budget.params),
                max_macs=limits.macs,
                max_params=limits.params,
                latency=budget.latency,
            ),
            dense=Cost(macs=cost.macs, params=cost.params),
            compressed=Cost(macs=allocation.costs["macs"], params=allocation.costs["params"]),
            layers=layers,
            decomposition=self.decomposition,
            predicted_error=problem.predicted_error(allocation.chosen),
            provenance=Provenance(
                versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
                seed=self.seed,
                gap=allocation.gap,
            ),
            latency=latency,
        )

    def _layer(
        self, layer: LayerCost, kernel_shape: tuple[int, ...], chosen: tuple[Candidates, int] | None
    ) -> LayerPlan:
        if chosen is None:
            reason = layer.keeps_dense or self.space.reason_to_keep(layer.name)
            return LayerPlan(kernel_shape=kernel_shape, dense=reason or "it was not among the layers of the search")
        candidates, index = chosen
        spec = candidates.spec(index)
        if spec is None:
            alone = len(candidates) == 1
            reason = "no candidate of the search space costs less" if alone else "the allocation leaves it as it is"
            return LayerPlan(kernel_shape=kernel_shape, dense=reason)
        return LayerPlan(kernel_shape=kernel_shape, spec=spec, error=float(candidates.error[index]))
