"""Latency in a search: which candidates are too slow, and plans that were measured to keep their budget."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kronsearch.budget import Budget, Limits, format_cost, parse_amount
from kronsearch.errors import BudgetError
from kronsearch.models.latency import Lineup
from kronsearch.models.profile import ModelCost
from kronsearch.plan import Latency, Plan
from kronsearch.search.allocate import Allocation
from kronsearch.search.candidates import Candidates
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.stopwatch import Stopwatch

__all__ = ["Pace", "specs_of"]

_PLAIN = Weighing()
_FAIR = 1.3  # times the part of the MACs is the part of the time that a network shall take
# Times the weighed error, at the most, is paid for that and for leaving out what is slower than dense. At half the MACs
# of ResNet-32, in batches of 64, 1.97 times the error is 4.3 times the divergence, before fine-tuning: too much.
_WORTH = 1.75
_TRIES = 4  # of an allocation that shall keep a budget of latency
_CLOSE = 0.95  # of that budget is used by a plan that is good enough to go on from
_MARGIN = 0.985  # of it is aimed at after a miss


@dataclass(frozen=True)
class Pace:
    """What a search asks of latency.

    Args:
        budget: of the search, with or without a bound on latency.
        stopwatch: what measures.
        allow_slower: whether candidates may be slower than the dense layer.
    """

    budget: Budget
    stopwatch: Stopwatch
    allow_slower: bool

    @property
    def bounded(self) -> bool:
        """Whether there is a budget of latency."""
        return self.budget.latency is not None

    @property
    def measures(self) -> bool:
        """Whether latency is of any account."""
        return self.bounded or not self.allow_slower

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same when a study is resumed, besides the budget."""
        setting = self.stopwatch.setting
        slower = {"slower layers": "allowed"} if self.allow_slower else {}
        return {"latency": f"batch {setting.batch}, threads {setting.threads}", **slower} if self.measures else {}

    def limits(self, cost: ModelCost) -> Limits:
        """Return the budget in plain numbers; that of latency in the terms of the dense network's, measured for it.

        Raises:
            BudgetError: the dense network keeps every bound already.
        """
        dense = self.stopwatch.nanoseconds if self.bounded else None
        return self.budget.limits(dense_macs=cost.macs, dense_params=cost.params, dense_latency=dense)

    def measured(self, plan: Plan) -> Plan:
        """Return a plan with what it was measured to take, unless it has that or latency is of no account."""
        if plan.latency is not None or not self.measures:
            return plan
        return plan.model_copy(update={"latency": self.stopwatch.compare(plan.replaced)})

    def problem(self, plain: Problem) -> Problem:
        """Return what the trials of a search are about, given what it would be if latency were of no account.

        With a budget of latency: the candidates that were measured, and a limit in their terms under which the plain
        allocation, measured as a whole network, keeps the budget and uses most of it.

        Without: the candidates that aren't slower than their dense layer, and under a budget of MACs a limit likewise,
        of 1.3 times the part of them that it leaves: half the MACs in 65 % of the time. That is let go where it can't
        be had, or not for 1.75 times the weighed error: first the second, then both.

        Raises:
            BudgetError: the budget can't be reached.
        """
        if not self.measures:
            return plain
        if not plain.candidates:
            raise BudgetError(f"a budget of {self.budget} can't be kept: the model has no layer that can be replaced")
        timed = self.stopwatch.timed(plain.candidates, keep_slower=self.allow_slower)
        problem = replace(plain, candidates=timed, latency=self.stopwatch.nanoseconds)
        if self.bounded:
            return self._aimed(problem, self.used)
        return self._unbounded(plain, problem)

    def allocate(self, problem: Problem, weighing: Weighing) -> tuple[Allocation, Latency | None] | None:
        """Return the allocation and, with a budget of latency, what it was measured to take; None if it misses that.

        A plan that misses the budget is allocated anew with a tighter limit, three times at the most.

        Raises:
            BudgetError: the budget can't be reached.
        """
        allocation = problem.allocate(weighing)
        if not self.bounded:
            return allocation, None
        for _ in range(_TRIES):
            latency = self.stopwatch.compare(specs_of(problem.candidates, allocation))
            used = self.used(latency)
            if used <= 1:
                return allocation, latency
            problem = _tightened(problem, allocation.costs["latency"], used)
            try:
                allocation = problem.allocate(weighing)
            except BudgetError:
                break
        return None

    def checked(self, problem: Problem, allocation: Allocation) -> tuple[Allocation, Latency | None] | None:
        """Return what `allocate` does for an allocation that stands: None if it was measured to miss the budget."""
        if not self.bounded:
            return allocation, None
        latency = self.stopwatch.compare(specs_of(problem.candidates, allocation))
        return (allocation, latency) if self.used(latency) <= 1 else None

    def used(self, latency: Latency) -> float:
        """Return which part of the budget was measured to be used, above 1 if it isn't kept."""
        assert self.budget.latency is not None
        amount = parse_amount(self.budget.latency, name="latency")
        return (latency.ratio if amount.relative else 1e6 * latency.compressed_ms) / float(amount.value)

    def _unbounded(self, plain: Problem, problem: Problem) -> Problem:
        """Return what trials are about without a budget of latency, given it without and with measured latencies."""
        most = _WORTH * plain.allocate(_PLAIN).error

        def is_worth_it(wish: Problem) -> bool:
            try:
                return wish.allocate(_PLAIN).error <= most
            except BudgetError:
                return False

        if not is_worth_it(problem):
            return plain
        part = 1.0 if plain.limits.macs is None else _FAIR * plain.limits.macs / plain.cost.macs
        if part >= 1:
            return problem
        fair = replace(problem, limits=replace(plain.limits, latency=int(part * self.stopwatch.nanoseconds)))
        with suppress(BudgetError):
            if is_worth_it(fair) and is_worth_it(fair := self._aimed(fair, lambda latency: latency.ratio / part)):
                return fair
        return problem

    def _aimed(self, problem: Problem, used_of: Callable[[Latency], float]) -> Problem:
        """Return the problem with the limit of latency at which the plain allocation was measured to use its budget.

        Args:
            problem: with the limit to begin with.
            used_of: tells which part of the budget was measured to be used.
        """
        limit = problem.limits.latency or 0
        best: Problem | None = None
        fastest: Latency | None = None
        for _ in range(_TRIES):
            problem = replace(problem, limits=replace(problem.limits, latency=limit))
            try:
                allocation = problem.allocate(_PLAIN)
            except BudgetError as error:
                if best is not None:
                    break
                raise BudgetError(self._unreachable(problem, fastest)) from error
            latency = self.stopwatch.compare(specs_of(problem.candidates, allocation))
            if fastest is None or latency.ratio < fastest.ratio:
                fastest = latency
            used = used_of(latency)
            if used <= 1 and (best is None or limit > (best.limits.latency or 0)):
                best = problem
            if _CLOSE <= used <= 1 or (used < 1 and limit == self.stopwatch.nanoseconds - 1):
                break
            limit = min(int(allocation.costs["latency"] / used * _MARGIN), self.stopwatch.nanoseconds - 1)
        if best is None:
            raise BudgetError(self._unreachable(problem, fastest))
        return best

    def _unreachable(self, problem: Problem, fastest: Latency | None) -> str:
        """Return what to say of a budget that can't be kept: the fastest plan measured, else the least predicted.

        Where no candidates keep the other bounds, how fast they are is of no account.
        """
        taken = (
            "" if self.allow_slower else " with no layer slower than its dense one (--allow-slower takes those, too)"
        )
        if fastest is None:
            try:
                replace(problem, limits=replace(problem.limits, latency=None)).allocate(_PLAIN)
            except BudgetError as error:
                return f"{error}{taken}"
        dense = self.stopwatch.nanoseconds
        least = dense - sum(
            int(layer.costs["latency"][0] - layer.costs["latency"].min()) for layer in problem.candidates
        )
        part = least / dense if fastest is None else fastest.ratio
        told = (
            f"a budget of {self.budget} can't be kept: the fastest network that was found takes {part:.1%} of the "
            f"dense one's {format_cost('latency', dense)} on this machine"
        )
        return f"{told},{taken}" if taken else told


def specs_of(candidates: Sequence[Candidates], allocation: Allocation) -> Lineup:
    """Return the spec of each layer that an allocation replaces."""
    chosen = zip(candidates, allocation.chosen, strict=True)
    return {layer.name: spec for layer, index in chosen if (spec := layer.spec(index)) is not None}


def _tightened(problem: Problem, latency: int, used: float) -> Problem:
    """Return the problem with the limit at which a plan of this predicted latency would have kept the budget."""
    return replace(problem, limits=replace(problem.limits, latency=int(latency / used * _MARGIN)))
