"""Reads amounts that are given in several units of one kind.

parse_amount("2 hours and 30 minutes")           ->  Amount(kind=0, size=Fraction(9000))
amount_of(Number(Fraction(5, 2), unit="hours"))  ->  the same
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from grpo_ext.rewards.math.number import Number

# The units of one kind with their sizes, in the singular.
_KINDS = [
    {"week": 604_800, "day": 86_400, "hour": 3600, "hr": 3600, "minute": 60, "min": 60, "second": 1, "sec": 1},
    {"yard": 36, "yd": 36, "feet": 12, "foot": 12, "ft": 12, "inche": 1, "inch": 1, "in": 1},
    {"pound": 16, "lb": 16, "ounce": 1, "oz": 1},
    {"dollar": 100, "cent": 1},
]
_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+?)s?(?: and |, and |, | |$)")


@dataclass(frozen=True)
class Amount:
    """An amount.

    Attributes:
        kind: index in `_KINDS`: time, length, weight or money.
        size: in the smallest unit of this kind.
    """

    kind: int
    size: Fraction


def parse_amount(text: str) -> Amount | None:
    """The amount that a normalized text states in two or more units of one kind; None for any other text."""
    total, end, kinds, sizes = Fraction(0), 0, set[int](), list[int]()
    for part in _PART.finditer(text):
        found = _unit(part[2])
        if found is None or part.start() != end:
            return None
        end = part.end()
        kinds.add(found[0])
        sizes.append(found[1])
        total += Fraction(part[1]) * found[1]
    if end < len(text) or len(sizes) < 2 or len(kinds) > 1 or len(set(sizes)) < len(sizes):
        return None
    return Amount(kinds.pop(), total)


def amount_of(number: Number) -> Amount | None:
    """The amount that a number with a unit states; None if its unit is of no such kind."""
    found = _unit(number.unit.removesuffix("s"))
    return Amount(found[0], number.value * found[1]) if found else None


def _unit(name: str) -> tuple[int, int] | None:
    """(kind, size) of a unit."""
    return next(((kind, units[name.lower()]) for kind, units in enumerate(_KINDS) if name.lower() in units), None)
