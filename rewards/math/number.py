r"""Plain numbers, read exactly.

    read_number("1,016.50")  ->  Number(Fraction(2033, 2))
    read_number("50%")       ->  Number(Fraction(50), percent=True)

Integers, decimals (repeating ones as `0.\overline{3}`), thousands separators, fractions, mixed numbers, scientific
notation, percentages; a currency sign and a unit are left out. Arithmetic that is left undone (`2+3`, `48/2`, `2^5`) is
no number.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {"万": 10**4, "亿": 10**8}

# A letter after a number may be a variable: `5m` is five m. Of these units, single letters count after a space only.
_LETTER_UNITS = "m|g|s|h|l|L|N|J|W|V|K|C|F|A"
_SHORT_UNITS = (
    "km|cm|mm|nm|dm|kg|mg|lbs?|oz|ft|in|yd|mi|ml|mL|cL|kL|hrs?|min|sec|ms|Hz|kHz|MHz|GHz|kW|kWh|MW|Pa|kPa|mol|cal|kcal|"
    "MB|GB|TB|KB|kB|cc|ha|mph|kph|deg|rad|USD|EUR|GBP|RMB|CNY|st|nd|rd|th"
)
# Words that change the value. `5 squared` is not 5.
_NO_UNITS = (
    "and|or|not|plus|minus|times|over|squared|cubed|factorial|dozens?|percent|per|"
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|"
    "hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?|hundredths?|thousandths?|"
    + "|".join(SCALES)
)
_CHINESE = r"(?![百千](?![克米瓦]))(?:(?![一二三四五六七八九十半])[\u4e00-\u9fff]){1,6}"
_POWER = r"(?:\ ?\^?\{?[23]\}?)?"
_WORD = rf"(?!(?:{_NO_UNITS})(?![a-z]))[A-Za-z]{{3,20}}"
_SPACED = rf"(?:(?:{_SHORT_UNITS}|{_LETTER_UNITS})(?![A-Za-z])|{_WORD}|{_CHINESE}){_POWER}"
_TIGHT = rf"(?:(?:{_SHORT_UNITS})(?![A-Za-z])|{_CHINESE}){_POWER}"
_UNIT = (
    rf"(?:\ ?/\ ?{_SPACED}|\ (?:per\ )?{_SPACED}|{_TIGHT})(?:(?:\ per\ |\ ?/\ ?|\ ?\\cdot\ ?|[\ -]){_SPACED}){{0,3}}"
)

_NUMBER = re.compile(
    rf"""
    (?:US|[€£¥₹₩])?\ ?(?P<sign>[-+]?)\ ?[€£¥₹₩]?\ ?
    (?:
        (?:(?P<whole>\d+)\ ?)? \\frac\ ?\{{\ ?(?P<top>-?\d+)\ ?\}}\ ?\{{\ ?(?P<bottom>\d+)\ ?\}}
      | (?:(?P<whole2>\d+)\ )? (?P<top2>\d+)\ ?/\ ?(?P<bottom2>\d+)
      | (?=[.\d]) (?P<integer>\d{{1,3}}(?:,\d{{3}})+ | \d{{1,3}}(?:\ \d{{3}})+ | \d*)
        (?: \.(?P<decimals>\d*) (?: \\overline\ ?\{{(?P<repeating>\d+)\}} )? )?
        (?: [eE](?P<exponent>[-+]?\d{{1,3}})
          | \ ?(?:\\times|\\cdot|\*|x)\ ?10\ ?\^\ ?\{{?\ ?(?P<power>[-+]?\d{{1,3}})\}}? )?
      | 10\ ?\^\ ?\{{?\ ?(?P<bare_power>[-+]?\d{{1,3}})\}}?
    )
    (?:\ ?(?P<scale>{"|".join(SCALES)})(?![a-z]))?
    (?P<percent>\ ?(?:%|(?:percent(?:age)?|per\ cent|pct)(?:\ points?)?))?
    (?:{_UNIT}|\ ?[€£¥₹₩])?
    """,
    re.VERBOSE,
)
_WITH_UNIT = re.compile(rf"(.*?[\d\\].*?)\ (?!(?:{_LETTER_UNITS})(?![A-Za-z])){_SPACED}(?:[\ /-]{_SPACED})?")


@dataclass(frozen=True)
class Number:
    """`value` as it is written, 50 for 50%; `lowest` unless it is a fraction such as 6/8."""

    value: Fraction
    percent: bool = False
    lowest: bool = True

    @property
    def exact(self) -> Fraction:
        """The value, 1/2 for 50%."""
        return self.value / 100 if self.percent else self.value


def read_number(text: str) -> Number | None:
    """The number that a tidy text is, or None; the text is as short as a final answer."""
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    part = found.groupdict()
    lowest = True
    top, bottom = part["top"] or part["top2"], part["bottom"] or part["bottom2"]
    if top:
        if int(bottom) == 0 or (int(bottom) > 1 and int(top) % int(bottom) == 0):
            return None  # nothing, or a division left undone
        value = int(part["whole"] or part["whole2"] or 0) + Fraction(int(top), int(bottom))
        lowest = Fraction(int(top), int(bottom)).denominator == int(bottom)
    elif part["bare_power"]:
        value = Fraction(10) ** int(part["bare_power"])
    else:
        integer = re.sub("[, ]", "", part["integer"])
        decimals, repeating = part["decimals"] or "", part["repeating"] or ""
        if not integer + decimals + repeating:
            return None
        value = Fraction(int((integer + decimals) or 0), 10 ** len(decimals))
        if repeating:
            value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(decimals))
        value *= Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    value *= SCALES.get(part["scale"], 1)
    if part["sign"] == "-":
        value = -value
    return Number(value, bool(part["percent"]), lowest)


def without_unit(text: str) -> str:
    """A tidy expression without the unit behind it; a single letter may be a variable and stays."""
    found = _WITH_UNIT.fullmatch(text)
    return found[1].strip() if found else text


def same_number(gold: Number, answer: Number) -> bool:
    """Equal, exactly. Where one of both carries a percent sign, 50% is 0.5 and also the 50 of "how many percent?".

    Below 1 it is one reading only: 0.5% is not 0.5.
    """
    if gold.percent == answer.percent:
        return gold.value == answer.value
    return gold.exact == answer.exact or (gold.value == answer.value and abs(gold.value) >= 1)
