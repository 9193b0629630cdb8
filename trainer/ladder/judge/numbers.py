"""The numbers of a table as people and spreadsheets write them: 1.3B, 45 %, 3,21, 124 000 000, 124 in "params (M)".

What can be read in two ways is refused.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

UNITS = {
    "k": 1e3, "thousand": 1e3, "thousands": 1e3, "m": 1e6, "mn": 1e6, "mio": 1e6, "million": 1e6, "millions": 1e6,
    "b": 1e9, "bn": 1e9, "billion": 1e9, "billions": 1e9, "t": 1e12, "tn": 1e12, "trillion": 1e12, "trillions": 1e12,
}  # fmt: skip
OF_FLOPS = {
    "flop": 1.0, "flops": 1.0, "tflop": 1e12, "tflops": 1e12, "pflop": 1e15, "pflops": 1e15, "eflop": 1e18,
    "eflops": 1e18, "zflop": 1e21, "zflops": 1e21, "pf-days": 8.64e19, "pf-day": 8.64e19, "petaflop/s-days": 8.64e19,
}  # fmt: skip
AMOUNTS = ("params", "tokens", "flops", "unique_tokens")
"""Roles whose numbers may have a unit."""
SHARES = ("loss", "downstream")
"""Roles whose numbers may be percentages."""
MISSING = {"", "na", "n/a", "#n/a", "null", "none", "-", "–", "—", "?"}
"""Ways to write that there is no value, in any case; of a loss "nan" is one that diverged."""
LEAST = {"params": 1e3, "tokens": 1e3, "flops": 1e6}
"""Smaller values are taken for another unit, such as millions of parameters."""
MOST = {"params": 1e15, "tokens": 1e18, "unique_tokens": 1e18, "flops": 1e35}
LOSSES = (1e-9, 1e9)

GROUPED_BY = {
    mark: re.compile(rf"[-+]?[1-9]\d{{0,2}}(?:{re.escape(mark)}\d{{3}})+(?![\d{mark}]|[eE][-+]?\d)")
    for mark in ",. '’\u00a0\u202f\u2009"
}
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%|[A-Za-z/-]*)")
FRACTION = {mark: re.compile(rf"[-+]?\d[\d.,]*?{re.escape(mark)}\d+(?:[eE][-+]?\d+)?\s*\D*") for mark in ",."}


def unit_of(column: str) -> tuple[str, str]:
    """Return a column's name without its unit, and the unit: ("params", "M") for "params (M)" or "params_M"."""
    for pattern in (r"(.+?)\s*[(\[]\s*(?:in\s+)?([^()\[\]]+?)\s*[)\]]", r"(.{2,}?)[\s_]+(?:in[\s_])?([A-Za-z-]+)"):
        found = re.fullmatch(pattern, column.strip())
        if found and factor_of(found[2]) is not None:
            return found[1], found[2]
    return column, ""


def factor_of(unit: str) -> float | None:
    """Return the number that a unit stands for, or None: 1e6 for "M", 1e18 for "10^18" and "1e18 FLOPs"."""
    word = unit.strip().lower()
    if word in UNITS or word in OF_FLOPS:
        return UNITS.get(word) or OF_FLOPS[word]
    power = re.fullmatch(r"(?:[x×]\s*)?1(?:0\s*(?:\^|\*\*)\s*|e\+?)(\d{1,2})(?:\s*flops?)?", word)
    return 10.0 ** int(power[1]) if power else None


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING)


def decimal_mark(values: Iterable[Any]) -> str | None:
    """Return the mark before the fraction, "." or ",", in a table with these values; None if it cannot be told.

    "3,21" and "1.234.567" tell one, "3.21" and "1,234,567" the other; "1,234" tells nothing.
    """
    texts = [value.strip() for value in values if isinstance(value, str)]
    told = {mark for text in texts for mark in ",." if _tells(text, mark)}
    if not told and not any(re.match(r"[-+]?[\d.]*,", text) for text in texts):
        return "."
    return told.pop() if len(told) == 1 else None


def _tells(text: str, mark: str) -> bool:
    """True if a text can only be a number whose fraction begins with this mark."""
    other = "." if mark == "," else ","
    number = re.match(r"[-+]?[\d.,]*", text)
    digits = number[0] if number else ""
    if digits.count(other) > 1:
        return bool(GROUPED_BY[other].match(digits)) and mark not in digits.partition(other)[0]
    if mark in digits and other in digits:
        return digits.rindex(mark) > digits.rindex(other)
    return digits.count(mark) == 1 and bool(FRACTION[mark].fullmatch(text)) and not GROUPED_BY[mark].match(text)


@dataclass(frozen=True)
class Numbers:
    """Rules for reading the numbers of one table."""

    decimal: str | None
    factors: dict[str, float]
    """By role: the unit that the column's name tells."""
    percentages: frozenset[str] = frozenset()
    """Roles whose values are percentages."""

    def read(self, value: Any, role: str) -> float:
        """Return the number that a value is. Raises ValueError with a fact that follows "NAME = VALUE"."""
        text = str(value).strip().replace("_", "")
        if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            return float(text)
        is_text = isinstance(value, str)  # JSON and parquet have numbers too, which are as they are
        found = NUMBER.fullmatch(self._plain(text) if is_text else text)
        if not found:
            raise ValueError("is no number")
        number, unit = float(found[1]), found[2]
        if unit == "%":
            if role not in self.percentages:
                raise ValueError("is a percentage, and other values of its column are none")
            return number / 100
        if unit:
            factor = factor_of(unit) if role in AMOUNTS and (role == "flops" or unit.lower() in UNITS) else None
            if factor is None:
                raise ValueError("is no number")
            return number * factor
        if role in self.percentages:
            raise ValueError("is no percentage, and other values of its column are")
        return number * self.factors.get(role, 1.0)

    def _plain(self, text: str) -> str:
        """Write a number with a decimal point and without marks between groups of digits."""
        for mark in " '’\u00a0\u202f\u2009":
            if found := GROUPED_BY[mark].match(text):
                text = found[0].replace(mark, "") + text[found.end() :]
        if "," not in text and self.decimal != ",":
            return text
        if self.decimal is None:
            raise ValueError("may be a fraction or a group of thousands: write numbers without commas")
        group = "." if self.decimal == "," else ","
        whole, mark, rest = text.partition(self.decimal)
        if group in whole:
            if not GROUPED_BY[group].match(whole):
                raise ValueError("is no number")
            whole = whole.replace(group, "")
        return f"{whole}.{rest}" if mark else whole


def implausible(number: float, role: str) -> str:
    """Return what is wrong with a finite number of a role; "" if nothing is."""
    if role == "loss":
        return "" if number == 0 or LOSSES[0] <= abs(number) <= LOSSES[1] else "is no loss or share of any model"
    if number < LEAST.get(role, -math.inf):
        return "is too few, as if in a larger unit: write all digits, or 124M, 2.5B"
    if number > MOST.get(role, math.inf):
        return "is too many: no run has so much compute, and so many parameters or tokens"
    return ""
