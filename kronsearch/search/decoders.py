"""How a trial becomes a plan: what the sampler is asked for, and what is made of its answer."""

from typing import Protocol

from optuna.trial import Trial

from kronsearch.choices import DecoderName
from kronsearch.plan import Latency
from kronsearch.search.allocate import Allocation
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.direct import excess, place, places
from kronsearch.search.pace import Pace
from kronsearch.search.study import Given

__all__ = ["Allocate", "Decoder", "Direct", "new_decoder"]

# Bounds of the logarithms: a factor of 1.6 and of 1.4 either way. Twice as wide most proposals are far worse than the
# plain allocation, which is nearly the best.
_IMPORTANCE, _PRICE = 0.5, 0.35
_CURVATURE = 0.2  # about 1
_TRUST = (0.25, 0.75)
_CONTEXT = (0.0, 1.5)
_GIVEN = (  # with which every study begins, the plain allocation first
    Weighing(),
    Weighing(context=0.5),
    Weighing(context=1.0),
    Weighing(trust=0.75),
    Weighing(trust=0.25),
)


class Decoder(Protocol):
    """A way from a trial to an allocation."""

    def decide(self, trial: Trial, problem: Problem, pace: Pace) -> tuple[Allocation, Latency | None] | None:
        """Ask the sampler, and return the allocation with what `Pace.allocate` tells of it.

        An allocation that doesn't keep the bounds of the problem is Optuna's to learn from: the trial has constraints.
        """

    def given(self, problem: Problem) -> Given:
        """Return what maps a slot to the parameters of a trial that every study begins with, or to None."""


class Allocate:
    """The sampler is asked how errors are weighed, and the allocation keeps the budgets by construction."""

    def decide(self, trial: Trial, problem: Problem, pace: Pace) -> tuple[Allocation, Latency | None] | None:
        """Allocate with a weighing of the sampler's."""
        return pace.allocate(problem, self.suggest(trial, problem))

    def suggest(self, trial: Trial, problem: Problem) -> Weighing:
        """Ask the sampler for a weighing."""
        return Weighing(
            trust=trial.suggest_float("trust", *_TRUST),
            curvature=trial.suggest_float("curvature", 1 - _CURVATURE, 1 + _CURVATURE),
            importance={
                group: trial.suggest_float(f"importance/{group}", -_IMPORTANCE, _IMPORTANCE) for group in problem.groups
            },
            price={kind: trial.suggest_float(f"price/{kind}", -_PRICE, _PRICE) for kind in problem.structures},
            context=trial.suggest_float("context", *_CONTEXT) if problem.context else 0.0,
        )

    def given(self, problem: Problem) -> Given:
        """Give the plain allocation, then those in context and of other trust in the sensitivities."""
        given = _given(problem)
        same = {f"importance/{group}": 0.0 for group in problem.groups}
        same |= {f"price/{kind}": 0.0 for kind in problem.structures}

        def of_slot(slot: int) -> dict[str, float] | None:
            if slot >= len(given):
                return None
            told = {"trust": given[slot].trust, "curvature": given[slot].curvature, **same}
            return told | ({"context": given[slot].context} if problem.context else {})

        return of_slot


class Direct:
    """The sampler is asked for each layer's place on its front, and told by how much the plan oversteps the budgets."""

    def decide(self, trial: Trial, problem: Problem, pace: Pace) -> tuple[Allocation, Latency | None] | None:
        """Take the candidates at the sampler's places; what oversteps a budget has no latency measured."""
        asked = {layer.name: trial.suggest_float(f"place/{layer.name}", 0.0, 1.0) for layer in problem.candidates}
        allocation = place(problem, asked)
        for name, over in excess(problem, allocation).items():
            trial.set_constraint(name, over)
        return pace.checked(problem, allocation) if problem.bounds.hold(**allocation.costs) else (allocation, None)

    def given(self, problem: Problem) -> Given:
        """Give the places of the plans that `Allocate` begins with."""
        given = _given(problem)

        def of_slot(slot: int) -> dict[str, float] | None:
            if slot >= len(given):
                return None
            found = places(problem, problem.allocate(given[slot]))
            return {f"place/{name}": where for name, where in found.items()}

        return of_slot


def _given(problem: Problem) -> list[Weighing]:
    """Return with which weighings a study of this problem begins."""
    return [weighing for weighing in _GIVEN if problem.context or not weighing.context]


def new_decoder(name: DecoderName) -> Decoder:
    """Return a decoder by its name."""
    return Allocate() if name == "allocate" else Direct()
