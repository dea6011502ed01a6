r"""Expressions, matrices and sets in LaTeX: read by Math-Verify, compared within bounded time.

    same_value("(x+1)^2", "x^2+2x+1")  ->  True

Math-Verify compares by sympy's `simplify` and `solve`, whose time has no bound. Here expressions are equal where their
values agree to 20 digits at eight fixed random points: quick, and no rounded number passes. Sets go to Math-Verify.
What grows beyond measure (towers of powers, factorials of large numbers) and what has to be worked out (integrals,
sums, limits) is not read at all, so that little depends on a time limit that works in the main thread only.
"""

import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import mpmath
import sympy
from antlr4 import PredictionContextCache
from antlr4.dfa.DFA import DFA
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.antlr_parser import PSParser
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef

from rewards.math.latex import depths
from rewards.workers.deadline import DeadlinePassed, within

Readable: TypeAlias = sympy.Basic | sympy.MatrixBase

# Seconds that reading, and then comparing, may take in the main thread; both usually take milliseconds.
COMPARISON_SECONDS = 2.0
MAX_BITS = 2**14  # of any number on the way
MAX_STATES = 20_000  # that Math-Verify's parser remembers; what people write needs some 2,000

_KNOWN = (
    "frac|sqrt|cdot|times|div|infty|pi|circ|cup|cap|setminus|in|mathbb|emptyset|binom|vec|overline|bar|hat|prime|top|"
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|lfloor|rfloor|lceil|rceil|"
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|"
    "omega|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[pb]?matrix\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_REFUSED = re.compile(
    rf"\\(?!(?:{_KNOWN})(?![A-Za-z]))[A-Za-z]"
    # arguments that sympy works with while it reads
    r"|\\binom(?!\s*\{\s*\w{1,2}\s*\}\s*\{\s*\w{1,2}\s*\})|\\sqrt\s*\[(?!\s*(?:\d{1,2}|[a-z])\s*\])"
)
# A word would be read as a product of letters, and 5 6 as a sum.
_NO_EXPRESSION = re.compile(r"[A-Za-z]{4}|(?<![_\d])\d+\s+\d|\d\.\d*\.|[^\x20-\x7e]|[<>=]")
_SET = re.compile(r",|\\(?:cup|cap|setminus|mathbb|emptyset|in)(?![A-Za-z])")
_SMALL_POWER = re.compile(r"\^\s*(?:\d(?!\d)|[A-Za-z]|\{\s*(?:\d{1,2}|[A-Za-z])\s*\})")

_EXTRACTION = [
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        # Its removal of units would take the c from 5c.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    )
]


def same_value(gold: str, answer: str) -> bool:
    """Whether two tidy texts are the same expression, matrix or set; False where either cannot be read."""
    left, right = read(gold), read(answer)
    return left is not None and right is not None and _in_time(lambda: _same(left, right))


def same_relation(gold: tuple[str, str, str], answer: tuple[str, str, str]) -> bool:
    r"""Whether two relations (left, sign, right) are the same up to a constant factor: 2x+4y = 6 is x+2y = 3.

    Signs are `=`, `\ne`, `<` and `\le`: the other two are these, turned round.
    """
    sides = [read(text) for text in (gold[0], gold[2], answer[0], answer[2])]
    if gold[1] != answer[1] or not all(isinstance(side, sympy.Expr) for side in sides):
        return False

    def compare() -> bool:
        rows = [(left - right, other - other_right) for left, right, other, other_right in _values(sides)]
        factors = [other / difference for difference, other in rows if abs(difference) > 1e-15]
        constant = len(factors) > 1 and all(_close(factor, factors[0]) for factor in factors)
        either_sign = gold[1] in ("=", r"\ne")
        return constant and (abs(factors[0]) if either_sign else factors[0].real) > 1e-15

    return _in_time(compare)


@lru_cache(maxsize=4096)  # the gold answer of a group is read once
def read(text: str) -> Readable | None:
    """The expression, matrix or set that a tidy text is, unevaluated; None where it cannot be read or is too large.

    The text is short and shallow; `rewards.math.answer` sees to that.
    """
    if not _is_harmless(text):
        return None
    # Decimals become exact fractions, and 2(3) a product: Math-Verify reads 2+3, as in a mixed number.
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", text)
    text = re.sub(r"(?<![_\d])(\d+)\s*\(", r"\1\\cdot(", text)
    if len(PSParser.sharedContextCache.cache) > MAX_STATES:  # it never forgets what noise it was given
        PSParser.sharedContextCache = PredictionContextCache()
        PSParser.decisionsToDFA = [DFA(state, number) for number, state in enumerate(PSParser.atn.decisionToState)]

    def parsed() -> list[Readable]:
        return parse(rf"\boxed{{{text}}}", _EXTRACTION, "no_fallback", parsing_timeout=None)

    try:
        (expression,) = within(COMPARISON_SECONDS, parsed)
        usable = isinstance(expression, Readable) and not expression.has(sympy.nan, sympy.zoo)
        return expression if usable and _bits(expression) <= MAX_BITS else None
    except (Exception, DeadlinePassed):  # whatever a model wrote
        return None


def _is_harmless(text: str) -> bool:
    """Without what sympy would compute while it reads."""
    bare = _MATRIX.sub("#", text)
    return (
        not _REFUSED.search(bare)
        and not _NO_EXPRESSION.search(_COMMAND.sub("#", bare))
        and not (_SET.search(text) and re.search(r"\^|!", text))  # the ends of intervals are compared
        and all(_is_small_exponent(text[power.end() :]) for power in re.finditer(r"\^\s*", text))
    )


def _is_small_exponent(rest: str) -> bool:
    """Whether the exponent that `rest` starts with holds no more than two small powers: not that of 9^{9^{9^9}}."""
    inside = rest[: next((place for place, depth in enumerate(depths(rest)) if depth == 0), None)]
    powers = inside.count("^")
    if "!" in inside or re.match(r"-?\w+\s*\^", rest):
        return False
    return powers <= 2 and powers == len(_SMALL_POWER.findall(inside))


def _bits(expression: Readable) -> float:
    """About log2 of the largest number that evaluating can meet; the values put in for symbols are below 3."""
    if isinstance(expression, sympy.MatrixBase):
        return max(map(_bits, expression.flat()), default=0)
    if isinstance(expression, sympy.Rational):
        return math.log2(max(abs(expression.p), expression.q))
    inside = [_bits(argument) for argument in expression.args] or [1.6]
    if isinstance(expression, sympy.Pow):
        return max(inside[0], 1) * 2 ** min(inside[1], 64)
    if isinstance(expression, sympy.exp | sympy.factorial):
        return max(inside[0], 1.5) * 2 ** min(inside[0], 64)
    return sum(inside) if isinstance(expression, sympy.Mul) else max(inside) + math.log2(len(inside))


def _same(gold: Readable, answer: Readable) -> bool:
    if gold == answer:
        return True
    if isinstance(gold, sympy.MatrixBase | sympy.MatrixExpr):
        gold, answer = gold.doit(), answer.doit()
        if not isinstance(answer, sympy.MatrixBase) or gold.shape != answer.shape:
            return False
        return all(_same(*entries) for entries in zip(gold.flat(), answer.flat(), strict=True))
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        rows = _values([gold, answer])
        return bool(rows) and all(_close(*row) for row in rows)
    return bool(verify([gold], [answer], timeout_seconds=None))


def _in_time(compare: Callable[[], bool]) -> bool:
    try:
        with mpmath.workdps(30):
            return within(COMPARISON_SECONDS, compare)
    except (Exception, DeadlinePassed):  # what cannot be compared is not right
        return False


def _close(left: mpmath.mpc, right: mpmath.mpc) -> bool:
    return abs(left - right) <= 1e-20 * max(abs(left), abs(right), 1e-80)


def _values(expressions: Sequence[sympy.Expr]) -> list[list[mpmath.mpc]]:
    """The values of all expressions, a row a point: at points where all are real, or at all where hardly any is."""
    expressions = [e.xreplace({f: sympy.Symbol(str(f)) for f in e.atoms(AppliedUndef)}) for e in expressions]
    names = sorted({symbol.name for e in expressions for symbol in e.free_symbols} - {"i"})
    rows = []
    for trial in range(8 if names else 1):
        rng = random.Random(trial)
        signs = (1, -1) if trial % 2 else (1, 1)
        point = {name: sympy.Rational(rng.randrange(20, 300) * rng.choice(signs), 101) for name in names}
        point["i"] = sympy.I
        values = [e.evalf(30, subs={symbol: point[symbol.name] for symbol in e.free_symbols}) for e in expressions]
        row = [mpmath.mpc(*(part._to_mpmath(120) for part in value.as_real_imag())) for value in values]
        if all(map(mpmath.isfinite, row)):
            rows.append(row)
    real = [row for row in rows if all(abs(value.imag) <= 1e-15 * abs(value.real) for value in row)]
    return real if len(real) >= min(2, len(rows)) else rows


# Math-Verify warns that its own time limit is off; `within` stands in its place.
logging.getLogger("math_verify").setLevel(logging.ERROR)
