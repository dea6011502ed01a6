r"""Normalizes the notation of short mathematical texts, and finds their brackets. Nothing is evaluated.

normalize("$-½$")                    ->  r"-\frac{1}{2}"
normalize("−\\dfrac12")              ->  r"-\frac{1}{2}"
match_outer_brackets("(1, [2, 3])")  ->  ("(", "1, [2, 3]", ")")
"""

import re
from functools import lru_cache

from grpo_ext.rewards.math.latex_arguments import brace_arguments

_CHARACTERS = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width forms
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff\ufe0f")
    | dict.fromkeys("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidirectional control characters
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f\u3000\n\r\t", " ")
    | dict.fromkeys("−–—‐‑‒﹣", "-")
    | {
        "￥": "¥",
        "。": ".",
        "、": ",",
        "∕": "/",
        "⁄": "/",
        "÷": "/",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∗": "*",
    }
    | {"±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∞": r"\infty ", "≈": r"\approx ", "°": r"^\circ "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset "}
    | {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta "}
    | {"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_COMMAND_NAMES = "sqrt|sin|cos|tan|cot|csc|arcsin|arccos|arctan|log|ln|exp|pi|theta"
_GREEK_NAMES = "alpha|beta|gamma|delta|epsilon|lambda|sigma|omega|rho|tau|phi"

_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:textbf|textit)?color(?:\{\w+\}|\s*\w+)|\\textcolor\{\w+\}|\\(?:bf|rm|it)(?![A-Za-z])", ""),
        (r"\\(?:boldsymbol|bm|operatorname)\s*\{(\d[\d.,]*)\}", r"\1"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])", ""),
        (r"\{,\}|,(?<!\\)\\!\s*", ","),  # the comma of 1{,}000 and 1,\!000
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)\\,(?=\d{3})", ""),
        (r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\\\$|\$", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (
            r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])",
            " ",
        ),  # degrees are a unit, and units are ignored
        (r"\\(?:tri)?angle(?![A-Za-z])", ""),
        (r"(?<!\\)\\%", "%"),
        (r"(?<![\w)}\]])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w({\[])", r"\1"),  # **bold**, unlike x**2
        (r"^[*\s]+|[*\s]+$", ""),
        (r"\*\*", "^"),
        (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty"),
        (r"\+\s*\\infty", r"\\infty"),
        (rf"(?<![\\A-Za-z])({_COMMAND_NAMES})(?![A-Za-z])", r"\\\1"),
        (rf"(?<![\\A-Za-z])(?<![A-Za-z] )({_GREEK_NAMES})(?![A-Za-z]| [A-Za-z]{{3}})", r"\\\1"),  # not gamma rays
        (r"(?<![\\A-Za-z/])(?<!\d )(?<!\d)sec(?=\s*[\^({\\]|\s[A-Za-z](?![A-Za-z]))", r"\\sec"),  # not 5 sec
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\ell(?![A-Za-z])", "l"),
        (r"\\overrightarrow(?![A-Za-z])", r"\\vec"),
        (r"(?<![A-Za-z])sq\.", "sq"),
        (r"(?<![\w)}])\((-?\d+)\)(?=\s*/)|(?<=/)\s*\((\d+)\)(?![\w(^])", r"\1\2"),
        (r"(?<![\w)}])\{(-?\d+)\}(?=\s*/)|(?<=/)\s*\{(\d+)\}", r"\1\2"),
        (r"[\[(]?\s*\\begin\{array\}(?:\{[clr| ]*\})?", r"\\begin{pmatrix}"),
        (r"\\end\{array\}\s*(?:[\])]|$)", r"\\end{pmatrix}"),
        (r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|(?<!\d)!=", r"\\ne "),  # 5!=120 is a factorial
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"^\s*\\approx(?![A-Za-z])", ""),
        (r"\s+", " "),
    )
]


@lru_cache(maxsize=1024)  # an answer is normalized several times, and a gold answer for each completion of its group
def normalize(text: str) -> str:
    """Rewrite a text in the notation that `parse_number` and `parse_expression` understand.

    Args:
        text: short, such as a final answer or the end of a prompt.
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: f"^{{{run.group().translate(_SUPERSCRIPTS)}}}", text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = brace_arguments(text).strip().removesuffix(".").strip()
    while text.startswith("{") and (wrapped := match_outer_brackets(text)) and wrapped[0] == "{":
        text = wrapped[1]
    return text


_OPEN = re.compile(r"\\(?:begin|langle|lfloor|lceil)(?![A-Za-z])|\\?[{]|[(\[]")
_BRACKET = re.compile(rf"(?P<open>{_OPEN.pattern})|\\(?:end|rangle|rfloor|rceil)(?![A-Za-z])|\\?[}}]|[)\]]")


def bracket_depths(text: str) -> list[int]:
    """The bracket depth of each character. Brackets of different kinds may pair up, as in `[1,2)`.

    A bracket counts as inside itself: "a(b)" -> [0, 1, 1, 1].
    """
    result, depth, done = [], 0, 0
    for bracket in _BRACKET.finditer(text):
        result += [depth] * (bracket.start() - done)
        depth += bool(bracket["open"])
        result += [depth] * len(bracket.group())
        depth -= not bracket["open"]
        done = bracket.end()
    return result + [depth] * (len(text) - done)


def split_outside_brackets(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split a text at the separators outside of all brackets; returns (pieces, separators), all stripped."""
    depth = bracket_depths(text)
    found = [match for match in separator.finditer(text) if depth[match.start()] == 0]
    starts, ends = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return pieces, [match.group().strip() for match in found]


def match_outer_brackets(text: str) -> tuple[str, str, str] | None:
    """(opening bracket, content, closing bracket) if one pair of brackets encloses the whole text, else None."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        if bracket.start() > 0 and depth == 0:
            return None
        depth += 1 if bracket["open"] else -1
        if depth == 0:
            opening = _BRACKET.match(text)
            assert opening is not None
            whole = bracket.end() == len(text)
            return (opening.group(), text[opening.end() : bracket.start()].strip(), bracket.group()) if whole else None
    return None
