r"""Parses the structure of a final answer, and decides whether an answer matches the gold answer.

    answers_match(parse_answer("x = 1 or x = 2"), parse_answer("2, 1"))  ->  True

This module splits lists, tuples, sets, intervals, equations and inequalities into numbers
(`grpo_ext.rewards.math.number`), expressions (`grpo_ext.rewards.math.expression`) and phrases.

- A bare list and a set are unordered; a tuple, a vector, `[...]` and an interval are ordered. A bare list also matches
  a set and, if it uses commas and has the right order, `(...)` and `[...]`. Otherwise the brackets must be the same,
  and so must the number of items. The values of `y = 2, x = 1` match (1, 2): they are sorted by name if all names are
  in one of the alphabets xyz, abcd, mn, pqrs and uvw. Values with other names, `k = 2, b = 1`, are in the gold order.
- `x = 5` matches 5, and 5 matches `x = 5`, but `y = 5` does not match `x = 5`. In a chain such as `x = 2+3 = 5` every
  step must hold, and `\ln x = 1` and `x! = 120` do not name what was asked for. If the gold answer is an equation, a
  constant factor is allowed; but `5x = 25` does not match `x = 5`.
- The value alone matches a gold equation that names it: 3 matches `|AB| = 3`, and (3, 2) matches `(p,q) = (3,2)`. The
  right side of a curve, `x+y = 1`, does not.
- Numbers with different units are paired by them: `2 girls and 3 boys` matches `3 boys and 2 girls`.
- Times of day and ratios are compared by `grpo_ext.rewards.math.colons`. An amount in several units, such as
  `2 hours 30 minutes`, matches the same amount in other units of its kind (`grpo_ext.rewards.math.amounts`).
- `x > 5` is `(5,\infty)`, and `1 < |x| < 2` is `(-2,-1) \cup (1,2)`. A union of intervals is a list of them.
- If the gold answer is a number, the answer must be one too: unevaluated arithmetic does not match.
- Phrases are compared ignoring case, white space, points and the hyphens of words, but not those between digits.
  Roman numerals and some two-letter words are phrases too: `VI` is not `IV`, and `no` is not `on`.
"""

import re
from dataclasses import dataclass
from operator import itemgetter

from grpo_ext.rewards.math.amounts import Amount, amount_of, parse_amount
from grpo_ext.rewards.math.colons import colons_match, has_colons
from grpo_ext.rewards.math.expression import expressions_match, parse_expression, relations_match
from grpo_ext.rewards.math.latex import bracket_depths, match_outer_brackets, normalize, split_outside_brackets
from grpo_ext.rewards.math.number import Number, numbers_match, parse_number, strip_unit, units_pair_up

MAX_CHARACTERS = 256  # a final answer is short
MAX_DEPTH = 10  # of brackets: the run time of Math-Verify's parser grows with the square of the depth

_CONJUNCTION = r"(?<![^\s,;)\]}])(?:and|or)(?![^\s(\\])"
_LIST_WORD = rf";|\\(?:lor|vee|cup)(?![A-Za-z])|{_CONJUNCTION}|(?<![\u4e00-\u9fff])[或和]|[或和](?![\u4e00-\u9fff])"
_ITEM_SEPARATOR = re.compile(
    rf"{_LIST_WORD}|(?<!\d),|,(?!\d{{3}}(?!\d))"
)  # a comma before three digits groups thousands
_ITEM_SEPARATOR_ANY_COMMA = re.compile(rf"{_LIST_WORD}|,")
_RELATION_SIGN = re.compile(r":?=|<|>|\\(?:approx|in|le|ge|ne)(?![A-Za-z])")
_MIRRORED_SIGN = {">": "<", r"\ge": r"\le"}
_SYMBOL = re.compile(r"(?:\\?[A-Za-z]+|[\u4e00-\u9fff]+)'*(?:_(?:\w|\{[\w ]+\}))?\s*(?:\([^()=]*\))?")
# Other words of two letters are products.
_TWO_LETTERS = r"(?<![A-Za-z])(?:[IVX]{2}|(?i:am|if|in|is|no|of|ok|on|or|pm|to|up))(?![A-Za-z])"
# Up to five words, such as "no solution" or "June 20", or two numbers with words between them, such as "1 in 3".
_PHRASE = re.compile(
    rf"(?=.*(?:[A-Za-z]{{3}}|[^\x00-\x7f]|{_TWO_LETTERS}))[^\W\d_]{{1,24}}(?:[ '-]+\w{{1,24}}){{0,4}}"
    r"|\d+(?: [A-Za-z]{2,24}){1,2} \d+"
)
# What does not count in a phrase: spaces and points, unless between digits, and the hyphens of words.
_IGNORED = re.compile(r"(?<![\d .'])[ .']+|[ .']+(?![\d .'])|[\"“”‘’]|(?<=[^\W\d_]{3})-(?=[^\W\d_]{3})")
_COUNTED_THINGS = re.compile(r"\d+ [a-z]{3,20}(?: \d+ [a-z]{3,20})+")
_ABSOLUTE = re.compile(r"\|[A-Za-z]\|")
_BASED_NUMBER = re.compile(r"\(?([0-9A-F]+)\)?_ ?\{?(\d{1,2})\}?")
_SET_BUILDER = re.compile(r"([A-Za-z])(?: ?\\in ?\\mathbb\{R\})? ?(?:\||\\mid(?![A-Za-z])|:) ?(?=.*\1)(.+)")
_REAL_LINE = {r"\mathbb{R}", r"\mathbb R", "all real numbers", "all reals"}
_FUNCTION_OF_UNKNOWN = re.compile(
    r"!|\\(?:ln|log|exp|sin|cos|tan)(?![A-Za-z])(?:_\{?\w+\}?)?(?:\^\{\d\})? ?\(?[xyz](?![A-Za-z])"
)
_NAME_TUPLE = re.compile(r"\( ?[A-Za-z](?:_\w)?(?: ?, ?[A-Za-z](?:_\w)?)+ ?\)")
_CURVE = re.compile(r"[xyz]{2,}")
_BRACKET_KIND = {"(": "(", r"\langle": "(", "[": "[", r"\{": "{", ")": ")", r"\rangle": ")", "]": "]", r"\}": "}"}


@dataclass(frozen=True)
class Collection:
    """A list, tuple, set or interval.

    Attributes:
        brackets: "()", "[]", "{}", "[)" or "(]"; "" for a bare list.
        items: the parsed items.
    """

    brackets: str
    items: tuple["ParsedAnswer", ...]


@dataclass(frozen=True)
class Relation:
    """An equation or an inequality.

    Attributes:
        name: left side of `name = value = ...`, or the unknown of a solved inequality; "" if there is none.
        values: the other parts of the chain; for a solved inequality, its interval.
        sides: (left, sign, right) if the relation has exactly two sides.
        is_approximate: whether a chain has an approximation in it.
    """

    name: str = ""
    values: tuple["ParsedAnswer", ...] = ()
    sides: tuple[str, str, str] | None = None
    is_approximate: bool = False


ParsedAnswer = Number | str | Collection | Relation | Amount


def parse_answer(text: str) -> ParsedAnswer | None:
    """The structure of a final answer, with expressions left as text; None if it is empty, too long or too deep."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = normalize(text)
    return _parse(text) if text and max(bracket_depths(text)) <= MAX_DEPTH else None


def is_parseable(answer: ParsedAnswer | None) -> bool:
    """Whether every part can be interpreted, as is required of a gold answer."""
    if isinstance(answer, Collection):
        return all(map(is_parseable, answer.items))
    if isinstance(answer, Relation):
        if answer.name:
            return all(map(is_parseable, answer.values))
        return (
            answer.sides is not None
            and parse_expression(answer.sides[0]) is not None
            and parse_expression(answer.sides[2]) is not None
        )
    if isinstance(answer, str):
        return bool(_PHRASE.fullmatch(answer)) or has_colons(answer) or parse_expression(answer) is not None
    return isinstance(answer, Number | Amount)


def is_fully_evaluated(answer: ParsedAnswer) -> bool:
    """Whether the answer consists only of names and numbers in lowest terms, so that nothing is left to compute."""
    if isinstance(answer, Collection):
        return all(map(is_fully_evaluated, answer.items))
    if isinstance(answer, Relation):
        return bool(_SYMBOL.fullmatch(answer.name)) and all(map(is_fully_evaluated, answer.values))
    return isinstance(answer, Amount) or (isinstance(answer, Number) and answer.in_lowest_terms)


def answers_match(gold: ParsedAnswer, answer: ParsedAnswer) -> bool:
    """Whether an answer matches the gold answer by the rules of this module. Not symmetric."""
    if isinstance(gold, Relation):
        return _matches_relation(gold, answer)
    if isinstance(answer, Relation):
        *steps, last = answer.values or ("",)
        return answers_match(gold, last) and all(
            answers_match(gold, step) or _evaluates_to(gold, step) for step in steps
        )
    if isinstance(gold, Amount) or isinstance(answer, Amount):
        amounts = [amount_of(part) if isinstance(part, Number) else part for part in (gold, answer)]
        return amounts[0] == amounts[1]
    if isinstance(gold, Collection) or isinstance(answer, Collection):
        return isinstance(gold, Collection) and isinstance(answer, Collection) and _items_match(gold, answer)
    if isinstance(gold, Number):
        return isinstance(answer, Number) and numbers_match(gold, answer)
    if isinstance(answer, str):
        bases = [_BASED_NUMBER.fullmatch(text) for text in (gold, answer)]
        if bases[0] and bases[1]:
            return bases[0].groups() == bases[1].groups()
        if has_colons(gold) and has_colons(answer):
            return colons_match(gold, answer)
    if _PHRASE.fullmatch(gold):
        return isinstance(answer, str) and _bare_phrase(gold) == _bare_phrase(answer)
    return gold == answer or _evaluates_to(gold, answer)


def _parse(text: str) -> ParsedAnswer:
    wrapped = match_outer_brackets(text)
    if wrapped and wrapped[0] == "{":
        return _parse(wrapped[1])
    if amount := parse_amount(text):
        return amount
    if _COUNTED_THINGS.fullmatch(text):  # 7 boys 3 girls
        return Collection("{}", tuple(map(_parse, re.findall(r"\d+ [a-z]+", text))))
    if text in _REAL_LINE:
        return Collection("()", (r"-\infty", r"\infty"))
    if ";" in text and "," in text:
        groups = [group for group in split_outside_brackets(text, re.compile(";"))[0] if group]
        if len(groups) > 1:
            return Collection("{}", tuple(map(_parse, groups)))
    pieces, separators = split_outside_brackets(text, _ITEM_SEPARATOR)
    items = [item for item in pieces if item]
    if len(items) > 1:
        return Collection("" if set(separators) == {","} else "{}", tuple(map(_parse, items)))  # "1 or 2" is unordered
    if items and items[0] != text:
        return _parse(items[0])  # a superfluous comma
    if wrapped and wrapped[0] in _BRACKET_KIND and wrapped[2] in _BRACKET_KIND:
        return _parse_brackets(_BRACKET_KIND[wrapped[0]] + _BRACKET_KIND[wrapped[2]], wrapped[1])
    parts, signs = split_outside_brackets(text, _RELATION_SIGN)
    if signs:
        return _parse_relation(parts, signs)
    if r"\pm" in text and r"\pmod" not in text:
        return Collection("", (_parse(text.replace(r"\pm", "+").lstrip("+ ")), _parse(text.replace(r"\pm", "-"))))
    return parse_number(text) or (text if has_colons(text) else strip_unit(text))


def _parse_brackets(brackets: str, inside: str) -> ParsedAnswer:
    builder = _SET_BUILDER.fullmatch(inside) if brackets == "{}" else None
    if builder:
        return _parse(builder[2])
    # (100,200) is a pair. In (1,000, 2,000) only the commas before a space separate items.
    separator = _ITEM_SEPARATOR if ", " in inside else _ITEM_SEPARATOR_ANY_COMMA
    items = [item for item in split_outside_brackets(inside, separator)[0] if item]
    if len(items) == 1 and brackets in ("()", "{}"):
        return _parse(items[0])
    return Collection(brackets, tuple(map(_parse, items)))


def _parse_relation(parts: list[str], signs: list[str]) -> Relation:
    if all(sign in ("=", ":=", r"\approx", r"\in") for sign in signs):
        if len(parts) == 2 and _SYMBOL.fullmatch(parts[1]) and not _is_name(parts[0]):
            parts = parts[::-1]
        names = 0
        while names < len(parts) - 1 and _is_name(parts[names]) and not _FUNCTION_OF_UNKNOWN.search(parts[names]):
            names += 1
        sides = (parts[0], "=", parts[1]) if len(parts) == 2 else None
        return Relation(parts[0] if names else "", tuple(map(_parse, parts[names:])), sides, r"\approx" in signs)
    if all(sign in _MIRRORED_SIGN for sign in signs):
        parts, signs = parts[::-1], [_MIRRORED_SIGN[sign] for sign in signs[::-1]]
    if not all(sign in ("<", r"\le", r"\ne") for sign in signs):
        return Relation()
    sides = (parts[0], signs[0], parts[1]) if len(parts) == 2 else None
    if intervals := _absolute_intervals(parts, signs):
        return Relation(intervals[0], (intervals[1],), sides)
    symbols = [place for place, part in enumerate(parts) if _SYMBOL.fullmatch(part)]
    if len(symbols) != 1 or len(parts) > 3 or (len(parts) == 3 and symbols != [1]) or r"\ne" in signs:
        return Relation(sides=sides)
    (place,) = symbols
    low = (parts[place - 1], signs[place - 1]) if place else (r"-\infty", "<")
    high = (parts[place + 1], signs[place]) if place + 1 < len(parts) else (r"\infty", "<")
    brackets = ("(" if low[1] == "<" else "[") + (")" if high[1] == "<" else "]")
    return Relation(parts[place], (Collection(brackets, (_parse(low[0]), _parse(high[0]))),), sides)


def _absolute_intervals(parts: list[str], signs: list[str]) -> tuple[str, Collection] | None:
    """The unknown and the intervals of `|x| < 2`, `1 < |x|` or `1 < |x| < 2`; None for any other relation."""
    places = [place for place, part in enumerate(parts) if _ABSOLUTE.fullmatch(part)]
    bounds = [parse_number(part) for part in parts if not _ABSOLUTE.fullmatch(part)]
    if len(places) != 1 or len(parts) > 3 or not all(bound and bound.value >= 0 for bound in bounds):
        return None
    (place,) = places
    if r"\ne" in signs or (len(parts) == 3 and place != 1):
        return None
    low = parts[0] if place else None
    high = parts[-1] if place + 1 < len(parts) else r"\infty"
    outer = ("(", ")") if place + 1 == len(parts) or signs[place] == "<" else ("[", "]")
    if low is None:
        return parts[place][1], Collection(outer[0] + outer[1], (_parse("-" + high), _parse(high)))
    inner = (")", "(") if signs[0] == "<" else ("]", "[")
    negative = Collection(outer[0] + inner[0], (_parse("-" + high), _parse("-" + low)))
    positive = Collection(inner[1] + outer[1], (_parse(low), _parse(high)))
    return parts[place][1], Collection("{}", (negative, positive))


def _is_name(text: str) -> bool:
    """Whether a left side names what was asked for (x, x_1, a+b, f(2)) and is not still to be solved (-x, 5x, x^2)."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|\^\{?-1\}?(?=\()", "", text)
    while (shorter := re.sub(r"(?<=[A-Za-z])\s*\([^()]*\)", "", bare)) != bare:
        bare = shorter
    return bool(re.search(r"[^\W\d_]", bare)) and not re.search(r"^-|\d|\^|\\sqrt", bare)


def _names_value(text: str) -> bool:
    """Whether the right side of an equation with this left side is an answer by itself, unlike for a curve: x+y = 1."""
    letters = "".join(sorted(set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))))
    if not letters:  # \log_6(216) = 3
        return True
    return bool(_NAME_TUPLE.fullmatch(text)) or (_is_name(text) and not _CURVE.fullmatch(letters))


def _bare_phrase(text: str) -> str:
    return _IGNORED.sub("", text).casefold()


def _without_spaces(text: str) -> str:
    return re.sub(r"[\s{}]", "", text).casefold()


def _evaluates_to(gold: ParsedAnswer, answer: ParsedAnswer) -> bool:
    left, right = (str(part.exact) if isinstance(part, Number) else part for part in (gold, answer))
    return isinstance(left, str) and isinstance(right, str) and expressions_match(left, right)


def _items_match(gold: Collection, answer: Collection) -> bool:
    if all(isinstance(item, Number) for item in (*gold.items, *answer.items)):
        pair_up = units_pair_up(gold.items, answer.items)  # type: ignore[arg-type]
        if pair_up is not None:
            return pair_up
    names = [item.name for item in gold.items if isinstance(item, Relation)]
    named = len(set(names)) > 1 and len(names) == len(gold.items)
    is_indexed = len({name.partition("_")[0] for name in names}) == 1  # the roots x_1 and x_2 have no order
    if named and not is_indexed and not any(isinstance(item, Relation) for item in answer.items):
        together = any(set(names) <= set(alphabet) for alphabet in ("xyz", "abcd", "mn", "pqrs", "uvw"))
        pairs = zip(names, gold.items, strict=True)
        items = tuple(item for _, item in (sorted(pairs, key=itemgetter(0)) if together else pairs))
        gold = Collection("()", items)
    kinds = {gold.brackets, answer.brackets}
    comparable = len(kinds) == 1 or ("" in kinds and kinds < {"", "()", "[]", "{}"})
    if not comparable or len(gold.items) != len(answer.items):
        return False
    if kinds <= {"", "{}"}:
        left = list(answer.items)
        for item in gold.items:
            match = next((place for place, other in enumerate(left) if answers_match(item, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True
    return all(answers_match(item, other) for item, other in zip(gold.items, answer.items, strict=True))


def _matches_relation(gold: Relation, answer: ParsedAnswer) -> bool:
    name = gold.name if _SYMBOL.fullmatch(gold.name) else ""
    if isinstance(answer, Collection) and gold.sides and _NAME_TUPLE.fullmatch(gold.name):
        value = gold.values[-1]
        names = [part.strip() for part in gold.name.strip("() ").split(",")]
        if isinstance(value, Collection) and all(isinstance(item, Relation) for item in answer.items):
            items = tuple(Relation(one, (item,)) for one, item in zip(names, value.items, strict=False))
            return _items_match(Collection("", items), answer)
    if not isinstance(answer, Relation):
        is_answer = gold.sides is None or (gold.sides[1] == "=" and (not gold.name or _names_value(gold.name)))
        is_inequality = bool(name) and gold.sides is not None and gold.sides[1] != "="
        values = gold.values if gold.is_approximate else gold.values[-1:]
        if gold.sides and not gold.name:
            is_answer = is_answer and _names_value(gold.sides[0])
        return (is_answer or is_inequality) and any(answers_match(value, answer) for value in values)
    if (
        name
        and _without_spaces(name) == _without_spaces(answer.name)
        and answers_match(gold.values[-1], Relation(values=answer.values))
    ):
        return True
    if not gold.sides or not answer.sides:
        return False
    unknowns = re.sub(r"\\[A-Za-z]+", "", gold.sides[0] + gold.sides[2]).replace(name, "", 1)
    if name and not re.search(r"[A-Za-z]", unknowns):
        return False  # the gold answer is x = 5, and 5x = 25 is unsolved
    return relations_match(gold.sides, answer.sides)
