"""Compares texts with colons: times of day and ratios.

colons_match("8:34 p.m.", "20:34")  ->  True
colons_match("14:22", "7:11")       ->  True, as a ratio
colons_match("1:12", "11:2")        ->  False
"""

import re
from fractions import Fraction

_COLONS = re.compile(r"\d{1,9}(?: ?: ?\d{1,9}){1,5}(?: ?[AaPp]\.? ?[Mm]\.?)?")


def has_colons(text: str) -> bool:
    """Whether a normalized text is a time of day or a ratio."""
    return bool(_COLONS.fullmatch(text))


def colons_match(gold: str, answer: str) -> bool:
    """Whether two such texts are the same time of day, or else the same ratio."""
    if _is_clock(gold) or _is_clock(answer):
        return _clock(gold) == _clock(answer)
    return _ratio(gold) == _ratio(answer)


def _parts(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _is_clock(text: str) -> bool:
    """Only a time of day has a leading zero or an am/pm marker."""
    return bool(re.search("[Mm]", text)) or any(len(part) > 1 and part[0] == "0" for part in _parts(text))


def _clock(text: str) -> tuple[int, ...]:
    hours, *rest = map(int, _parts(text))
    half = re.search("[AaPp](?=.{0,2}[Mm])", text)
    if half:
        hours = hours % 12 + 12 * (half.group() in "Pp")
    return (hours, *rest, *[0] * (2 - len(rest)))


def _ratio(text: str) -> list[Fraction]:
    parts = [Fraction(part) for part in _parts(text)]
    total = sum(parts)
    return [part / total for part in parts] if total else parts
