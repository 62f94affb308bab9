"""Budgets: upper bounds on the MACs and the parameters of a network, absolute or relative to the dense one."""

import re
from dataclasses import dataclass
from fractions import Fraction

from kronsearch.errors import BudgetError

__all__ = ["Amount", "Budget", "Limits", "budgets", "format_count", "parse_amount"]

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST = 1000  # budgets of a sweep
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKMGT%]?)", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """Budgets in plain numbers; None where there is no bound."""

    macs: int | None
    params: int | None

    def hold(self, *, macs: int, params: int) -> bool:
        """Tell whether a network of these costs is inside of the bounds."""
        return (self.macs is None or macs <= self.macs) and (self.params is None or params <= self.params)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds as a user writes them, such as `1G`, `90k`, `50%`, or an int.

    Args:
        flops: bound on the MACs of one example, as fvcore counts (one multiply-accumulate is one "flop").
        params: bound on the number of parameters.

    Raises:
        BudgetError: no bound at all, or an amount that can't be read.
    """

    flops: str | int | None = None
    params: str | int | None = None

    def __post_init__(self) -> None:
        if self.flops is None and self.params is None:
            raise BudgetError("no budget given: pass --budget-flops (such as 1G or 50%), --budget-params, or both")
        for name, amount in (("flops", self.flops), ("params", self.params)):
            if amount is not None:
                parse_amount(amount, name=name)

    def limits(self, *, dense_macs: int, dense_params: int) -> Limits:
        """Return the bounds in plain numbers.

        Raises:
            BudgetError: the dense network keeps every bound already.
        """
        macs = None if self.flops is None else parse_amount(self.flops, name="flops").of(dense_macs)
        params = None if self.params is None else parse_amount(self.params, name="params").of(dense_params)
        if (macs is None or macs >= dense_macs) and (params is None or params >= dense_params):
            raise BudgetError(
                f"the budget ({self}) is kept by the dense model already ({format_count(dense_macs)} MACs, "
                f"{format_count(dense_params)} params): nothing needs to be done"
            )
        return Limits(macs, params)

    def __str__(self) -> str:
        """Write the bounds that there are, such as `flops 50%, params 90k`."""
        bounds = (("flops", self.flops), ("params", self.params))
        return ", ".join(f"{name} {amount}" for name, amount in bounds if amount is not None)


@dataclass(frozen=True)
class Amount:
    """An amount as written: a count, or a part of the dense model's."""

    value: Fraction
    relative: bool

    def of(self, dense: int) -> int:
        """Return the count, rounded down, given the dense model's."""
        return int(self.value * dense) if self.relative else int(self.value)


def parse_amount(amount: str | int, *, name: str) -> Amount:
    """Read an amount such as `1.5G`, `90k`, `1000` or `50%`.

    Raises:
        BudgetError: it can't be read, or is not above zero.
    """
    found = _AMOUNT.fullmatch(str(amount).strip())
    if found is None:
        raise BudgetError(f"a budget of {name} {amount!r} can't be read: write a number such as 1G, 90k or 50%")
    relative = found[2] == "%"
    read = Amount(Fraction(found[1]) * (Fraction(1, 100) if relative else _FACTORS[found[2]]), relative)
    if read.value == 0 or (not relative and read.value < 1):
        raise BudgetError(f"a budget of {name} {amount} leaves nothing: write a number above zero, such as 1G or 50%")
    return read


def budgets(*, flops: str | int | None = None, params: str | int | None = None) -> list[Budget]:
    """Return the budgets of a sweep: exactly one of the two costs has several amounts.

    Args:
        flops: `25%:90%:20` (from, to, how many, evenly spaced), `30%,50%` or `1G,2G,3G`; or one amount, kept fixed.
        params: likewise.

    Raises:
        BudgetError: neither or both have several amounts, or one can't be read.
    """
    of_flops = [None] if flops is None else _amounts(flops, name="flops")
    of_params = [None] if params is None else _amounts(params, name="params")
    if len(of_flops) > 1 and len(of_params) > 1:
        raise BudgetError("both budgets have several values: a sweep goes over one of them, so fix the other")
    if len(of_flops) == len(of_params) == 1:
        given = "one budget" if (flops, params) != (None, None) else "no budgets"
        raise BudgetError(
            f"{given} given: pass several with --budget-flops or --budget-params, such as 25%:90%:20 (from, to, how "
            "many) or 30%,50%,70%"
        )
    return [Budget(flops=most_macs, params=most_params) for most_macs in of_flops for most_params in of_params]


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
    low, high = parse_amount(first, name=name), parse_amount(last, name=name)
    if low.relative != high.relative or low.value >= high.value:
        raise BudgetError(
            f"budgets of {name} {text} go nowhere: both ends are counts, or both parts of the dense model's, and the "
            "first is the smaller one"
        )
    step = (high.value - low.value) / (int(count) - 1)
    between = [low.value + step * place for place in range(1, int(count) - 1)]
    return [
        first,
        *(f"{round(float(100 * value), 2):g}%" if low.relative else str(int(value)) for value in between),
        last,
    ]


def format_count(count: int) -> str:
    """Write a count with three or four digits and a unit, such as `1.819 G`."""
    for factor, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return str(count)
