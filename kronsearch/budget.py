"""Budgets: upper bounds on the MACs and the parameters of a network, absolute or relative to the dense one."""

import re
from dataclasses import dataclass
from fractions import Fraction

from kronsearch.errors import BudgetError

__all__ = ["Amount", "Budget", "Limits", "format_count", "parse_amount"]

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
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


def format_count(count: int) -> str:
    """Write a count with three or four digits and a unit, such as `1.819 G`."""
    for factor, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return str(count)
