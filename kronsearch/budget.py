"""Budgets: upper bounds on MACs, parameters and latency of a network, absolute or relative to the dense one."""

import re
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import product

from kronsearch.errors import BudgetError

__all__ = [
    "Amount",
    "Budget",
    "Limits",
    "Span",
    "budgets",
    "format_cost",
    "format_count",
    "parse_amount",
    "read_span",
]

_COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_COSTS = {"flops": "macs", "params": "params", "latency": "latency"}  # what limits call the costs of a budget
_TIMES = {"us": 10**3, "ms": 10**6, "s": 10**9}  # nanoseconds
_MOST = 1000  # budgets of a sweep
_LARGEST = 10**18  # amount: plans and the allocation count in 64 bits
_AMOUNT = re.compile(r"(\d{1,19}(?:\.\d{1,9})?)\s*([a-zA-Z%]{0,2})", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """Budgets in plain numbers, latency in nanoseconds; None where there is no bound."""

    macs: int | None = None
    params: int | None = None
    latency: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """The bounds that there are, by the name of the cost."""
        return {field.name: limit for field in fields(self) if (limit := getattr(self, field.name)) is not None}

    def hold(self, **costs: int) -> bool:
        """Tell whether a network of these costs is inside of the bounds."""
        return all(costs[name] <= limit for name, limit in self.given.items())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds as a user writes them: `1G`, `90k` or an int; `5ms` for latency; `50%` of the dense network's.

    Args:
        flops: bound on the MACs of one example, as fvcore counts (one multiply-accumulate is one "flop").
        params: bound on the number of parameters.
        latency: bound on the time that the network takes, as it is measured on the machine at hand.

    Raises:
        BudgetError: no bound at all, or an amount that can't be read.
    """

    flops: str | int | None = None
    params: str | int | None = None
    latency: str | None = None

    def __post_init__(self) -> None:
        if not self.given:
            raise BudgetError(
                "no budget given: pass --budget-flops (such as 1G or 50%), --budget-params or --budget-latency"
            )
        for name, amount in self.given.items():
            parse_amount(amount, name=name)

    @property
    def given(self) -> dict[str, str | int]:
        """The bounds that there are, by name."""
        return {field.name: amount for field in fields(self) if (amount := getattr(self, field.name)) is not None}

    def limits(self, *, dense_macs: int, dense_params: int, dense_latency: int | None = None) -> Limits:
        """Return the bounds in plain numbers.

        Args:
            dense_macs: MACs of the dense network.
            dense_params: its parameters.
            dense_latency: its latency in nanoseconds; None leaves that bound out, as one that isn't looked at yet.

        Raises:
            BudgetError: the dense network keeps every bound already.
        """
        dense = {"macs": dense_macs, "params": dense_params, "latency": dense_latency}
        bounds = {}
        for name, amount in self.given.items():
            if (own := dense[_COSTS[name]]) is not None:
                bounds[_COSTS[name]] = parse_amount(amount, name=name).of(own)
        if len(bounds) == len(self.given) and all(limit >= (dense[cost] or 0) for cost, limit in bounds.items()):
            costs = ", ".join(format_cost(cost, own) for cost, own in dense.items() if own is not None)
            raise BudgetError(
                f"the budget ({self}) is kept by the dense model already ({costs}): nothing needs to be done"
            )
        return Limits(**bounds)

    def __str__(self) -> str:
        """Write the bounds that there are, such as `flops 50%, params 90k`."""
        return ", ".join(f"{name} {amount}" for name, amount in self.given.items())


@dataclass(frozen=True)
class Amount:
    """An amount as written: a count, or a part of the dense model's."""

    value: Fraction
    relative: bool

    def of(self, dense: int) -> int:
        """Return the count, rounded down and at most 10^18, given the dense model's."""
        return min(int(self.value * dense) if self.relative else int(self.value), _LARGEST)


def parse_amount(amount: str | int, *, name: str) -> Amount:
    """Read an amount such as `1.5G`, `90k`, `1000` or `50%`; of the latency, such as `5ms` or `50%`, in nanoseconds.

    Raises:
        BudgetError: it can't be read, is not above zero, or is above 10^18 (10^18 %).
    """
    timed = name == "latency"
    units, examples = (_TIMES, "5ms, 800us or 50%") if timed else (_COUNTS, "1G, 90k or 50%")
    try:
        found = _AMOUNT.fullmatch(str(amount).strip())
    except ValueError:  # a number of thousands of digits
        found, amount = None, "of thousands of digits"
    if found is None or found[2] not in (*units, "%"):
        raise BudgetError(
            f"a budget of {name} {amount!r} can't be read: write a {'time' if timed else 'number'} such as {examples}"
        )
    relative = found[2] == "%"
    read = Amount(Fraction(found[1]) * (Fraction(1, 100) if relative else units[found[2]]), relative)
    if read.value == 0 or (not relative and read.value < 1):
        raise BudgetError(
            f"a budget of {name} {amount} leaves nothing: write a {'time' if timed else 'number'} above zero, such as "
            f"{'5ms' if timed else '1G'} or 50%"
        )
    if read.value * (100 if relative else 1) > _LARGEST:
        raise BudgetError(
            f"a budget of {name} {amount} is more than any network needs: write a smaller "
            f"{'time, such as 5ms' if timed else 'number, such as 1G'} or 50%"
        )
    return read


@dataclass(frozen=True)
class Span:
    """The budgets between two ends, of which one cost's bound differs.

    Args:
        cost: `flops` or `params`: the cost whose bound differs.
        low: the smallest bound.
        high: the largest.
        fixed: the other cost's bound, as the user wrote it; None where there is none.
    """

    cost: str
    low: str
    high: str
    fixed: str | int | None

    @property
    def limited(self) -> str:
        """What limits call the cost."""
        return _COSTS[self.cost]

    @property
    def _other(self) -> str:
        return "params" if self.cost == "flops" else "flops"

    def at(self, place: float) -> Budget:
        """Return the budget at a place from 0, the smallest, to 1, the largest; even steps are even ratios."""
        low, high = (parse_amount(amount, name=self.cost) for amount in (self.low, self.high))
        value = float(low.value) * float(high.value / low.value) ** place
        between = _percent(float(f"{100 * value:.4g}")) if low.relative else str(int(value))
        amount = self.low if place <= 0 else self.high if place >= 1 else between
        if 0 < place < 1 and not low.value <= parse_amount(amount, name=self.cost).value <= high.value:  # by rounding
            amount = self.low if place < 0.5 else self.high
        return Budget(**{self.cost: amount, self._other: self.fixed})  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Write it as budgets are written, such as `flops 25%:90%, params 60%`."""
        bounds = {self.cost: f"{self.low}:{self.high}", self._other: self.fixed}
        return ", ".join(f"{name} {bounds[name]}" for name in ("flops", "params") if bounds[name] is not None)


def read_span(*, flops: str | int | None = None, params: str | int | None = None) -> Span:
    """Return the budgets of a search for a front: exactly one of the costs has two ends, such as `25%:90%`.

    Raises:
        BudgetError: none or both have, or one can't be read.
    """
    given = {"flops": flops, "params": params}
    spans = [name for name, written in given.items() if ":" in str(written)]
    if len(spans) != 1:
        raise BudgetError(
            f"{'none' if not spans else 'each'} of the budgets of flops and params has two ends: the front is searched "
            "between two of one, such as --budget-flops 25%:90%"
        )
    cost = spans[0]
    low, high, *more = [part.strip() for part in str(given[cost]).split(":")]
    if more:
        raise BudgetError(f"budgets of {cost} {given[cost]} can't be read: write FROM:TO, such as 25%:90%")
    _check_ends(low, high, cost, str(given[cost]))
    span = Span(cost, low, high, given["params" if cost == "flops" else "flops"])
    span.at(0)  # reads the other bound
    return span


def budgets(
    *, flops: str | int | None = None, params: str | int | None = None, latency: str | None = None
) -> list[Budget]:
    """Return the budgets of a sweep: exactly one of the costs has several amounts.

    Args:
        flops: `25%:90%:20` (from, to, how many, evenly spaced), `30%,50%` or `1G,2G,3G`; or one amount, kept fixed.
        params: likewise.
        latency: likewise, such as `4ms:8ms:5`.

    Raises:
        BudgetError: none or more than one has several amounts, or one can't be read.
    """
    given = {"flops": flops, "params": params, "latency": latency}
    amounts = {name: [None] if written is None else _amounts(written, name=name) for name, written in given.items()}
    several = [name for name, values in amounts.items() if len(values) > 1]
    if len(several) > 1:
        raise BudgetError(
            f"budgets of {' and '.join(several)} have several values: a sweep goes over one of them, so fix the others"
        )
    if not several:
        counted = "no budgets given" if all(written is None for written in given.values()) else "one budget given"
        raise BudgetError(
            f"{counted}: pass several with --budget-flops, --budget-params or --budget-latency, such as 25%:90%:20 "
            "(from, to, how many) or 30%,50%,70%"
        )
    return [
        Budget(flops=most_macs, params=most_params, latency=longest)
        for most_macs, most_params, longest in product(*amounts.values())
    ]


def _amounts(written: str | int, *, name: str) -> list[str]:
    """Read one amount, several with commas between, or `FROM:TO:HOW MANY`."""
    text = str(written)
    amounts = _spaced(text, name) if ":" in text else [part.strip() for part in text.split(",")]
    values = [parse_amount(amount, name=name) for amount in amounts]
    if len(set(values)) < len(values):
        raise BudgetError(f"budgets of {name} {text} are not all different: ask for fewer, or for a wider range")
    return amounts


def _spaced(text: str, name: str) -> list[str]:
    first, last, count, *more = [part.strip() for part in (*text.split(":"), "", "")]
    if any(more) or re.fullmatch(r"[1-9]\d{0,8}", count, re.ASCII) is None or not 2 <= int(count) <= _MOST:
        raise BudgetError(
            f"budgets of {name} {text} can't be read: write FROM:TO:HOW MANY, such as 25%:90%:20, with 2 to {_MOST}"
        )
    low, high = _check_ends(first, last, name, text)
    step = (high.value - low.value) / (int(count) - 1)
    between = [low.value + step * place for place in range(1, int(count) - 1)]
    return [
        first,
        *(_percent(round(float(100 * value), 2)) if low.relative else _absolute(int(value), name) for value in between),
        last,
    ]


def _check_ends(first: str, last: str, name: str, text: str) -> tuple[Amount, Amount]:
    low, high = parse_amount(first, name=name), parse_amount(last, name=name)
    if low.relative != high.relative or low.value >= high.value:
        raise BudgetError(
            f"budgets of {name} {text} go nowhere: both ends are counts, or both parts of the dense model's, and the "
            "first is the smaller one"
        )
    return low, high


def _percent(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".") + "%"


def _absolute(value: int, name: str) -> str:
    return f"{value / 10**6:.9f}".rstrip("0").rstrip(".") + "ms" if name == "latency" else str(value)


def format_cost(name: str, cost: int, *, exact: bool = False) -> str:
    """Write a cost by the name it has in `Limits`, such as `1.819 G MACs` or `5.2 ms`; if exact, all of a count."""
    if name == "latency":
        return f"{cost / 10**6:.4g} ms"
    return f"{cost if exact else format_count(cost)} {'MACs' if name == 'macs' else name}"


def format_count(count: int) -> str:
    """Write a count with three or four digits and a unit, such as `1.819 G`."""
    for factor, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return str(count)
