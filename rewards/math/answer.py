r"""The structure of a final answer, and when two answers are the same.

    same(read_answer("x = 1 or x = 2"), read_answer("2, 1"))  ->  True

Lists, tuples, sets, intervals, equations and inequalities are taken apart here; what is left are numbers
(`rewards.math.number`), expressions (`rewards.math.expression`) and words.

- A bare list and a set have no order; a tuple, a vector, `[...]` and an interval have. A bare list also passes for a
  set, and with commas in its order for `(...)` and `[...]`; so do the values of `y = 2, x = 1` for (1, 2), by name.
  Brackets otherwise have to be the same, and so does the count.
- `x = 5` is 5, and 5 is `x = 5`, but `y = 5` is not `x = 5`. In a chain such as `x = 2+3 = 5` every step has to hold.
  Where an equation is the gold answer, a constant factor does not matter; but `x = 5` is not met by `5x = 25`.
- `x > 5` is `(5,\infty)`; a union of intervals is a list of them.
- Where the gold answer is a number, so is the answer: arithmetic left undone is none.
- Words are compared without case and spaces.
"""

import re
from dataclasses import dataclass
from operator import itemgetter

from rewards.math.expression import read, same_relation, same_value
from rewards.math.latex import depths, split, tidy, unwrap
from rewards.math.number import Number, read_number, same_number, without_unit

MAX_CHARACTERS = 256  # a final answer is short
MAX_DEPTH = 10  # of brackets: the time of Math-Verify's grammar grows with its square

_AND = r"(?<![^\s,;])(?:and|or)(?![^\s(\\])"
_BETWEEN = rf";|\\(?:lor|vee|cup)(?![A-Za-z])|{_AND}|(?<![\u4e00-\u9fff])[或和]|[或和](?![\u4e00-\u9fff])"
_LIST = re.compile(rf"{_BETWEEN}|(?<!\d),|,(?!\d{{3}}(?!\d))")  # a comma before three digits groups thousands
_LIST_OF_DIGITS = re.compile(rf"{_BETWEEN}|,")
_SIGN = re.compile(r":?=|<|>|\\(?:approx|in|le|ge|ne)(?![A-Za-z])")
_TURNED = {">": "<", r"\ge": r"\le"}
_SYMBOL = re.compile(r"(?:\\?[A-Za-z]+|[\u4e00-\u9fff]+)'*(?:_(?:\w|\{\w+\}))?\s*(?:\([^()=]*\))?")
# Up to five words, such as "no solution" or "June 20", or a time of day.
_WORDS = re.compile(
    r"(?=.*(?:[A-Za-z]{3}|[^\x00-\x7f]))[^\W\d_]{1,24}(?:[ '-]+\w{1,24}){0,4}"
    r"|\d{1,2}:\d\d(?: ?[AaPp]\.?[Mm]\.?)?"
)
_BRACKETS = {"(": "(", r"\langle": "(", "[": "[", r"\{": "{", ")": ")", r"\rangle": ")", "]": "]", r"\}": "}"}


@dataclass(frozen=True)
class Group:
    """Items in brackets: "()", "[]", "{}", "[)", "(]", or "" for a bare list."""

    brackets: str
    items: tuple["Answer", ...]


@dataclass(frozen=True)
class Relation:
    """`name` and `values` of `name = value = ...`, or of an inequality solved for `name`, whose value is an interval;
    `sides`: (left, sign, right) where there are two."""

    name: str = ""
    values: tuple["Answer", ...] = ()
    sides: tuple[str, str, str] | None = None


Answer = Number | str | Group | Relation


def read_answer(text: str) -> Answer | None:
    """The structure of a final answer; its expressions are read later. None where it is empty, too long or too deep."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = tidy(text)
    return _read(text) if text and max(depths(text)) <= MAX_DEPTH else None


def is_readable(answer: Answer | None) -> bool:
    """Whether all parts have a meaning here, as those of a gold answer must."""
    if isinstance(answer, Group):
        return all(map(is_readable, answer.items))
    if isinstance(answer, Relation):
        if answer.name:
            return all(map(is_readable, answer.values))
        return answer.sides is not None and read(answer.sides[0]) is not None and read(answer.sides[2]) is not None
    if isinstance(answer, str):
        return bool(_WORDS.fullmatch(answer)) or read(answer) is not None
    return isinstance(answer, Number)


def is_final(answer: Answer) -> bool:
    """Whether it is made of numbers in lowest terms and names only: nothing is left to be worked out."""
    if isinstance(answer, Group):
        return all(map(is_final, answer.items))
    if isinstance(answer, Relation):
        return bool(_SYMBOL.fullmatch(answer.name)) and all(map(is_final, answer.values))
    return isinstance(answer, Number) and answer.lowest


def same(gold: Answer, answer: Answer) -> bool:
    """Whether the answer is the gold answer, by the rules above; not symmetric."""
    if isinstance(gold, Relation):
        return _same_as_relation(gold, answer)
    if isinstance(answer, Relation):
        *steps, last = answer.values or ("",)
        return same(gold, last) and all(same(gold, step) or _evaluates_to(gold, step) for step in steps)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return isinstance(gold, Group) and isinstance(answer, Group) and _same_items(gold, answer)
    if isinstance(gold, Number):
        return isinstance(answer, Number) and same_number(gold, answer)
    if _WORDS.fullmatch(gold):
        return isinstance(answer, str) and _letters(gold) == _letters(answer)
    return gold == answer or _evaluates_to(gold, answer)


def _read(text: str) -> Answer:
    wrapped = unwrap(text)
    if wrapped and wrapped[0] == "{":
        return _read(wrapped[1])
    pieces, separators = split(text, _LIST)
    items = [item for item in pieces if item]
    if len(items) > 1:
        return Group("" if set(separators) == {","} else "{}", tuple(map(_read, items)))  # 1 or 2 has no order
    if items and items[0] != text:
        return _read(items[0])  # a comma too many
    if wrapped and wrapped[0] in _BRACKETS and wrapped[2] in _BRACKETS:
        return _read_brackets(_BRACKETS[wrapped[0]] + _BRACKETS[wrapped[2]], wrapped[1])
    parts, signs = split(text, _SIGN)
    if signs:
        return _read_relation(parts, signs)
    if r"\pm" in text:
        return Group("", (_read(text.replace(r"\pm", "+").lstrip("+ ")), _read(text.replace(r"\pm", "-"))))
    return read_number(text) or without_unit(text)


def _read_brackets(brackets: str, inside: str) -> Answer:
    # (100,200) is a pair; in (1,000, 2,000) the commas with a space separate
    separator = _LIST if ", " in inside else _LIST_OF_DIGITS
    items = [item for item in split(inside, separator)[0] if item]
    if len(items) == 1 and brackets in ("()", "{}"):
        return _read(items[0])
    return Group(brackets, tuple(map(_read, items)))


def _read_relation(parts: list[str], signs: list[str]) -> Relation:
    if all(sign in ("=", ":=", r"\approx", r"\in") for sign in signs):
        if len(parts) == 2 and _SYMBOL.fullmatch(parts[1]) and not _is_name(parts[0]):
            parts = parts[::-1]
        names = 0
        while names < len(parts) - 1 and _is_name(parts[names]):
            names += 1
        sides = (parts[0], "=", parts[1]) if len(parts) == 2 else None
        return Relation(parts[0] if names else "", tuple(map(_read, parts[names:])), sides)
    if all(sign in _TURNED for sign in signs):
        parts, signs = parts[::-1], [_TURNED[sign] for sign in signs[::-1]]
    if not all(sign in ("<", r"\le", r"\ne") for sign in signs):
        return Relation()
    sides = (parts[0], signs[0], parts[1]) if len(parts) == 2 else None
    symbols = [place for place, part in enumerate(parts) if _SYMBOL.fullmatch(part)]
    if len(symbols) != 1 or len(parts) > 3 or (len(parts) == 3 and symbols != [1]) or r"\ne" in signs:
        return Relation(sides=sides)
    (place,) = symbols
    low = (parts[place - 1], signs[place - 1]) if place else (r"-\infty", "<")
    high = (parts[place + 1], signs[place]) if place + 1 < len(parts) else (r"\infty", "<")
    brackets = ("(" if low[1] == "<" else "[") + (")" if high[1] == "<" else "]")
    return Relation(parts[place], (Group(brackets, (_read(low[0]), _read(high[0]))),), sides)


def _is_name(text: str) -> bool:
    """Whether this names what was asked for, such as x, x_1, a+b or f(2), and is no equation's side: -x, 5x, x^2."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)", "", text)
    return bool(re.search(r"[^\W\d_]", bare)) and not re.search(r"^-|\d|\^|\\sqrt", bare)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}]", "", text).casefold()


def _evaluates_to(gold: Answer, answer: Answer) -> bool:
    left, right = (str(part.exact) if isinstance(part, Number) else part for part in (gold, answer))
    return isinstance(left, str) and isinstance(right, str) and same_value(left, right)


def _same_items(gold: Group, answer: Group) -> bool:
    names = [item.name for item in gold.items if isinstance(item, Relation)]
    named = len(set(names)) > 1 and len(names) == len(gold.items)
    if named and not any(isinstance(item, Relation) for item in answer.items):
        gold = Group("()", tuple(item for _, item in sorted(zip(names, gold.items, strict=True), key=itemgetter(0))))
    kinds = {gold.brackets, answer.brackets}
    comparable = len(kinds) == 1 or ("" in kinds and kinds < {"", "()", "[]", "{}"})
    if not comparable or len(gold.items) != len(answer.items):
        return False
    if kinds <= {"", "{}"}:
        left = list(answer.items)
        for item in gold.items:
            match = next((place for place, other in enumerate(left) if same(item, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True
    return all(same(item, other) for item, other in zip(gold.items, answer.items, strict=True))


def _same_as_relation(gold: Relation, answer: Answer) -> bool:
    name = gold.name if _SYMBOL.fullmatch(gold.name) else ""
    if not isinstance(answer, Relation):
        return bool(name) and same(gold.values[-1], answer)
    if name and _squeezed(name) == _squeezed(answer.name) and same(gold.values[-1], Relation(values=answer.values)):
        return True
    if not gold.sides or not answer.sides:
        return False
    unknowns = re.sub(r"\\[A-Za-z]+", "", gold.sides[0] + gold.sides[2]).replace(name, "", 1)
    if name and not re.search(r"[A-Za-z]", unknowns):
        return False  # x = 5 is asked for, and 5x = 25 has not been solved
    return same_relation(gold.sides, answer.sides)
