r"""Plain numbers, parsed exactly.

    parse_number("1,016.50")  ->  Number(Fraction(2033, 2))
    parse_number("50%")       ->  Number(Fraction(50), is_percent=True)

Supported: integers, decimals (also repeating: `0.\overline{3}`), thousands separators, fractions (also `3 sevenths`),
mixed numbers, scientific notation, percentages, and the words for small numbers. Currency signs and units are ignored.
Unevaluated arithmetic (`2+3`, `48/2`, `2^5`) is not a number.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"quadrillion": 10**15, "quintillion": 10**18, "lakh": 10**5, "crore": 10**7}
_NTH = {f"{name}th": size for name, size in SCALES.items()}
SCALES |= {"万": 10**4, "亿": 10**8}
for _stems, _ending, _first, _step in (
    ("third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth", "", 3, 1),
    ("thir four fif six seven eigh nine", "teenth", 13, 1),
    ("twent thirt fort fift sixt sevent eight ninet", "ieth", 20, 10),
):
    _NTH |= {stem + _ending: _first + _step * place for place, stem in enumerate(_stems.split())}
_NTHS = {"halves": 2} | {f"{name}s": size for name, size in _NTH.items()}
_NTH["half"] = 2
_DENOMINATORS = _NTH | _NTHS
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# Words after a number that must agree if both answers have one: 20 June is not 20 July.
_MONTHS = "january february march april may june july august september october november december"
QUALIFIERS = frozenset(f"{_MONTHS} north south east west northeast northwest southeast southwest am pm".split())

# A letter after a number may be a variable: `5m` is five m. So single letters count as units only after a space.
_LETTER_UNITS = "m|g|s|h|l|L|N|J|W|V|K|C|F|A"
_SHORT_UNITS = (
    "km|cm|mm|nm|dm|kg|mg|lbs?|oz|ft|in|yd|mi|ml|mL|cL|kL|hrs?|min|sec|ms|Hz|kHz|MHz|GHz|kW|kWh|MW|Pa|kPa|mol|cal|kcal|"
    r"sq|MB|GB|TB|KB|kB|cc|ha|mph|kph|deg|rad|USD|EUR|GBP|RMB|CNY|st|nd|rd|th|[AaPp]\.?[Mm]\.?"
)
# Words that change the value, so they are not units: `5 squared` is not 5.
_NOT_UNITS = (
    "and|or|not|but|maybe|plus|minus|times|over|divided|mod|choose|squared|cubed|factorial|doubled|tripled|halved|half|"
    "percent|per|quarters?|" + "|".join([*_WORDS, *_NTHS, *SCALES, *(f"{scale}s" for scale in SCALES)])
)
# Nor are these, unless a noun follows: `20 fifth graders`, `5 wrong answers`. Letters of one alphabet are a product.
_NOT_LAST = "wrong|incorrect|false|[abcd]{3,4}|[pqrs]{3,4}|[uvw]{3}|[xyz]{3}|" + "|".join(_NTH)
_CHINESE_UNIT = r"(?![百千](?![克米瓦]))(?:(?![一二三四五六七八九十半])[\u4e00-\u9fff]){1,6}"
_UNIT_POWER = r"(?:\ ?\^\{?[23]\}?|(?:(?<=m)|(?<=ft)|(?<=in))[23])?"  # of m^2 and cm3
_UNIT_WORD = rf"(?!(?i:{_NOT_UNITS}|(?:{_NOT_LAST})(?!\ [a-z]{{3}}))(?![A-Za-z]))[A-Za-z]{{3,20}}"
_SPACED_UNIT = rf"(?:(?:{_SHORT_UNITS}|{_LETTER_UNITS})(?![A-Za-z])|{_UNIT_WORD}|{_CHINESE_UNIT}){_UNIT_POWER}"
_NO_LETTER_UNIT = rf"(?!(?:{_LETTER_UNITS})(?![A-Za-z]))"
_LONG_WORD = rf"(?=[a-z]{{4}}){_UNIT_WORD}(?![A-Za-z])"
_TIGHT_UNIT = rf"(?:(?:{_SHORT_UNITS})(?![A-Za-z])|{_LONG_WORD}|{_CHINESE_UNIT}){_UNIT_POWER}"
_UNIT = (
    rf"(?:\ ?/\ ?{_NO_LETTER_UNIT}{_SPACED_UNIT}|\ (?:per\ )?{_SPACED_UNIT}|{_TIGHT_UNIT})"
    rf"(?:(?:\ per\ |\ ?/\ ?|\ ?\\cdot\ ?|[\ -]){_SPACED_UNIT}){{0,3}}"
    r"|\ of(?:\ (?:the|a|an))?\ [A-Za-z]{3,20}"
    rf"|(?:\ |(?=\([a-z]{{4}}))\({_UNIT_WORD}(?:\ {_UNIT_WORD})?\)"
)

_NUMBER = re.compile(
    rf"""
    (?:US|Rs\.?|[€£¥₹₩])?\ ?(?P<sign>[-+]?)\ ?[€£¥₹₩]?\ ?
    (?:
        (?:(?P<whole>\d+)\ ?)? \\frac\ ?\{{\ ?(?P<top>-?\d+)\ ?\}}\ ?\{{\ ?(?P<bottom>-?\d+)\ ?\}}
      | (?:(?P<whole2>\d+)\ )? (?P<top2>\d+)\ ?/\ ?(?P<bottom2>\d+)
      | (?=[.\d]) (?P<integer>\d{{1,3}}(?:,\d{{3}})+ | \d{{1,3}}(?:\ \d{{3}})+ | \d*)
        (?: \.(?P<decimals>\d*) (?: \\overline\ ?\{{(?P<repeating>\d+)\}} | \((?P<bracketed>\d+)\) )? )?
        (?: [eE](?P<exponent>[-+]?\d{{1,3}})
          | \ ?(?:\\times|\\cdot|\*|x)\ ?10\ ?\^\ ?\{{?\ ?(?P<power>[-+]?\d{{1,3}})\}}? )?
      | 10\ ?\^\ ?\{{?\ ?(?P<bare_power>[-+]?\d{{1,3}})\}}?
    )
    (?:\ ?(?P<scale>(?i:{"|".join(SCALES)}))s?(?![a-z]))?
    (?:(?:[\ -](?P<nths>(?i:{"|".join(_NTHS)}))|(?:-|(?<=1)(?<![\d.,/]1)\ )(?P<nth>(?i:{"|".join(_NTH)})))(?![a-z]))?
    (?P<percent>\ ?(?:%|(?:percent(?:age)?|per\ cent|pct)(?:\ points?)?))?
    (?P<unit>{_UNIT}|\ ?[€£¥₹₩])?
    (?:\ ?\\pmod\ ?\{{?\ ?(?P<modulus>\d+)\ ?\}}?)?
    """,
    re.VERBOSE,
)
_WITH_UNIT = re.compile(rf"(.*?[\d\\].*?)\ {_NO_LETTER_UNIT}{_SPACED_UNIT}(?:[\ /-]{_SPACED_UNIT})?")


@dataclass(frozen=True)
class Number:
    """A number of a final answer.

    Attributes:
        value: the number as written: 50 for 50%.
        is_percent: whether it has a percent sign.
        in_lowest_terms: False for a fraction such as 6/8.
        unit: the words after it, in lower case.
    """

    value: Fraction
    is_percent: bool = False
    in_lowest_terms: bool = True
    unit: str = ""

    @property
    def exact(self) -> Fraction:
        """The value with the percent sign applied: 1/2 for 50%."""
        return self.value / 100 if self.is_percent else self.value


def parse_number(text: str) -> Number | None:
    """The number that a normalized text states, or None if it does not state one.

    Args:
        text: normalized by `grpo_ext.rewards.math.latex.normalize`, and as short as a final answer.
    """
    if text.lower() in _WORDS:
        return Number(Fraction(_WORDS.index(text.lower())))
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    part = found.groupdict()
    in_lowest_terms = True
    top, bottom = part["top"] or part["top2"], part["bottom"] or part["bottom2"]
    if top:
        if int(bottom) == 0 or (abs(int(bottom)) > 1 and int(top) % int(bottom) == 0):
            return None  # a division by zero, or an unevaluated division: 48/2
        value = int(part["whole"] or part["whole2"] or 0) + Fraction(int(top), int(bottom))
        in_lowest_terms = Fraction(int(top), int(bottom)).denominator == abs(int(bottom))
    elif part["bare_power"]:
        value = Fraction(10) ** int(part["bare_power"])
    else:
        integer = re.sub("[, ]", "", part["integer"])
        decimals, repeating = part["decimals"] or "", part["repeating"] or part["bracketed"] or ""
        if not integer + decimals + repeating:
            return None
        value = Fraction(int((integer + decimals) or 0), 10 ** len(decimals))
        if repeating:
            value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(decimals))
        value *= Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    value *= SCALES.get((part["scale"] or "").lower(), 1)
    value /= _DENOMINATORS.get((part["nth"] or part["nths"] or "").lower(), 1)
    if part["sign"] == "-":
        value = -value
    unit = f"mod {part['modulus']}" if part["modulus"] else (part["unit"] or "").strip().lower()
    return Number(value, bool(part["percent"]), in_lowest_terms, unit)


def strip_unit(text: str) -> str:
    """A normalized expression without its trailing unit. A single letter stays, since it may be a variable."""
    found = _WITH_UNIT.fullmatch(text)
    return found[1].strip() if found else text


def numbers_match(gold: Number, answer: Number) -> bool:
    """Whether two numbers are exactly equal.

    If only one of them has a percent sign, 50% equals 0.5, and also 50, the answer to "how many percent?". Below 1 only
    the first reading is allowed: 0.5% is 0.005 and not 0.5. Units are not compared, but two months, directions, moduli,
    or am and pm must be the same.
    """
    qualifiers = [_qualifiers(gold), _qualifiers(answer)]
    if all(qualifiers) and qualifiers[0] != qualifiers[1]:
        return False
    if gold.is_percent == answer.is_percent:
        return gold.value == answer.value
    return gold.exact == answer.exact or (gold.value == answer.value and abs(gold.value) >= 1)


def units_pair_up(gold: Sequence[Number], answer: Sequence[Number]) -> bool | None:
    """Whether numbers that name the same different things have the same values: 3 boys and 2 girls.

    Returns:
        None if the units do not tell the numbers apart, or if the answer has other units.
    """
    units, other = [[number.unit.removesuffix("s") for number in numbers] for numbers in (gold, answer)]
    if not all(units) or len(set(units)) < len(units) or sorted(units) != sorted(other):
        return None
    return all(numbers_match(number, answer[other.index(unit)]) for unit, number in zip(units, gold, strict=True))


def _qualifiers(number: Number) -> frozenset[str]:
    if number.unit.startswith("mod "):
        return frozenset({number.unit})
    return QUALIFIERS & set(re.findall("[a-z]+", number.unit.replace(".", "")))
