r"""Puts braces around the arguments of LaTeX commands and around exponents.

    brace_arguments(r"x^2y^3 + \frac\pi4")  ->  r"x^{2}y^{3} + \frac{\pi}{4}"
    brace_arguments(r"{a \over b}")         ->  r"\frac{a}{b}"

Two habits of plain text differ from LaTeX: all digits after `^` and `\sqrt` belong to the argument (`x^10`,
`\sqrt12`), and so does a bracketed expression (`2^(n+1)`, `\sqrt(x+1)`). Unbalanced braces are not repaired.
"""

import re

from grpo_ext.rewards.math.cursor import Cursor

MAX_DEPTH = 40  # of braces and nested arguments; a deeper text is returned unchanged

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+|\s+|.", re.DOTALL)
_ARGUMENTS = {"^": 1, r"\sqrt": 1, r"\frac": 2, r"\binom": 2, r"\pmod": 1}
_HAS_ARGUMENTS = re.compile(r"\^|\{|\\(?:sqrt|frac|binom|pmod)")
_BRACKETED_NUMBER = re.compile(r"\(\s*(-?\d+)\s*\)")


class _TooDeepError(Exception):
    pass


def brace_arguments(text: str) -> str:
    """The text with braces around all arguments of `^`, `\\frac`, `\\binom`, `\\sqrt` and `\\pmod`."""
    if not _HAS_ARGUMENTS.search(text):
        return text
    try:
        return _Reader(text).read_all()
    except _TooDeepError:
        return text


class _Reader(Cursor):
    """A cursor over the tokens of a text."""

    def __init__(self, text: str) -> None:
        super().__init__(_TOKEN.findall(text))
        self.depth = 0

    def skip_spaces(self) -> None:
        while self.peek().isspace():
            self.place += 1

    def read_all(self) -> str:
        text = self.read_until("")
        while self.peek():  # a closing brace that was never opened
            text += self.next() + self.read_until("")
        return text

    def read_until(self, end: str) -> str:
        """Everything up to the closing token `end`, or to a closing brace, which is not consumed."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooDeepError
        pieces: list[str] = []
        while (token := self.peek()) and token not in ("}", end):
            pieces.append(self.read_item(pieces))
        self.depth -= 1
        if end == "}" and r"\over" in pieces:
            place = pieces.index(r"\over")
            return rf"\frac{{{''.join(pieces[:place]).strip()}}}{{{''.join(pieces[place + 1 :]).strip()}}}"
        return "".join(pieces)

    def read_item(self, before: list[str]) -> str:
        token = self.next()
        if token == "{":
            inside = self.read_until("}")
            if not self.peek():
                return "{" + inside
            self.place += 1
            previous = "".join(before[-3:]).rstrip()[-1:]
            is_lone_number = inside.strip().isdecimal() and (
                previous in "+-*/=<>(," or "".join(before).endswith(r"\ne ")
            )
            return inside if is_lone_number or inside.startswith(r"\frac") else "{" + inside + "}"
        if token == "(":
            inside = self.read_until(")")
            if self.peek() == ")":
                self.place += 1
                inside += ")"
            return "(" + inside
        return token + self.read_arguments(token) if token in _ARGUMENTS else token

    def read_arguments(self, command: str) -> str:
        text = ""
        if command == r"\sqrt":
            self.skip_spaces()
            if self.peek() == "[":
                text = self.next() + self.read_until("]") + (self.next() if self.peek() == "]" else "")
        return text + "".join(self.read_argument(command) for _ in range(_ARGUMENTS[command]))

    def read_argument(self, command: str) -> str:
        self.skip_spaces()
        token = self.next()
        if token == "":
            return ""
        if token == "}":
            self.place -= 1
            return ""
        if token == "{":
            inside = self.read_until("}").strip()
            if not self.peek():
                return "{" + inside
            self.place += 1
            while inside.startswith("{") and inside.endswith("}") and "{" not in inside[1:]:
                inside = inside[1:-1].strip()
            bracketed = _BRACKETED_NUMBER.fullmatch(inside)
            return "{" + (bracketed[1] if bracketed else inside) + "}"
        if token == "(" and command in ("^", r"\sqrt"):
            inside = self.read_until(")")
            if self.peek() != ")":
                return "(" + inside
            self.place += 1
            return "{" + inside + "}"
        if token in "+-" and command == "^" and self.peek()[:1].isalnum():
            return "{" + token + self.next() + "}"
        if token.isdecimal() and command in (r"\frac", r"\binom"):
            self.tokens[self.place - 1] = token[1:]
            self.place -= len(token) > 1
            return "{" + token[0] + "}"
        if token in _ARGUMENTS and token != "^":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _TooDeepError
            text = "{" + token + self.read_arguments(token) + "}"
            self.depth -= 1
            return text
        return "{" + token + "}"
