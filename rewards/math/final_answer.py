r"""Extracts the final answer of a text, without its marker.

    extract_final_answer("so 6*7 = \\boxed{42}")  ->  "42"

The first marker of this list that occurs wins. If it occurs several times, the last one counts:

1. `\boxed{...}` with its nested braces; an incomplete one does not count. `\boxed{1}` and `\boxed{2}` are a list if
   they are separated only by "and" or "or".
2. `<answer>...</answer>`
3. `#### ...`, up to the end of the line
4. "the answer is ...", "answer: ...", "答案是...", up to the end of the sentence
5. the whole text, if it is nothing but a number

Text before `</think>` is ignored, as is everything but the last 10,000 characters.
"""

import re
from itertools import pairwise

from grpo_ext.rewards.math.latex import normalize
from grpo_ext.rewards.math.number import parse_number

# The final answer is at the end. This also bounds every search below, whatever the length of the text.
TAIL_CHARACTERS = 10_000

_BRACE = re.compile(r"\\\\|\\[{}]|\\boxed\s*\{|[{}]")
_BETWEEN_BOXES = re.compile(
    r"(?=.{1,60}\Z)(?:[\s$,;]|\\[()\[\],;]|\\quad)*(?:[A-Za-z]+\s+)?(?:(?:\\text\{)?\s*(?:and|or)\s*\}?)"
    r"(?:[\s$]|\\[()\[\],;]|\\quad)*"
)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASH_LINE = re.compile(r"#{4,}[ \t]*([^\n]+)")
_ANSWER_PHRASE = re.compile(
    r"\banswers?(?:\s+is\b)?\s*[:=]\s*|\banswers?\s+(?:is|are|would\s+be)\b\s*(?:(?:therefore|thus|option)\b\s*)?[:=]?\s*"
    r"|\bcorrect\s+(?:option|choice)\s+is\b\s*:?\s*|答案\s*[是为选]?\s*[:：]\s*|答案\s*[是为选]\s*|故选\s*[:：]?\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?:(?<!Rs)(?<!\\)[.!](?=\s|$)|。|,?\s+(?:because|since)\s|,\s+(?:which|as)\s).*|<\|[^|<>]*\|>$|</s>$", re.DOTALL
)
_WRAPPING = re.compile(r"<\|[^|<>]*\|>$|</s>$|^`{1,3}|`{1,3}$")


def extract_final_answer(text: str, *, boxed_only: bool = False) -> str | None:
    """The final answer without surrounding white space, or None if there is none.

    Args:
        text: a completion or a gold solution, of any length.
        boxed_only: accept no marker other than `\\boxed{...}`.
    """
    text = text[-TAIL_CHARACTERS:].rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is not None or boxed_only:
        return boxed
    tagged = _last_tagged(text)
    if tagged is not None:
        return _unwrap(tagged)
    if hashes := _HASH_LINE.findall(text):
        return _unwrap(hashes[-1])
    for sentence in reversed(list(_ANSWER_PHRASE.finditer(text))):
        line = text[sentence.end() :].partition("\n")[0]
        if line.strip():
            return _SENTENCE_END.sub("", line.strip()).strip()
    whole = text.strip()
    return whole if len(whole) <= 64 and parse_number(normalize(whole)) else None


def _unwrap(marked: str) -> str:
    """A marked answer without backquotes, end-of-text tokens and a repeated "the answer is"."""
    marked = _WRAPPING.sub("", marked.strip()).strip()
    phrase = re.match(rf"(?:the\s+)?(?:{_ANSWER_PHRASE.pattern})", marked, re.IGNORECASE)
    return marked[phrase.end() :].strip() if phrase and phrase.end() < len(marked) else marked


def _last_boxed(text: str) -> str | None:
    opened: list[int] = []  # start of the content of each open brace; -1 if the brace is not that of a \boxed
    begin, end = -1, -1
    boxes: list[str] = []  # the last one, and those that a list connects with it
    for brace in _BRACE.finditer(text):
        if brace.group().startswith("\\boxed"):
            opened.append(brace.end())
        elif brace.group() == "{":
            opened.append(-1)
        elif brace.group() == "}" and opened and (closed := opened.pop()) > begin:
            if begin < 0 or not _BETWEEN_BOXES.fullmatch(text[end + 1 : text.rindex("\\boxed", 0, closed)]):
                boxes = []
            begin, end = closed, brace.start()
            boxes.append(text[begin:end].strip())
    return ", ".join(boxes) if boxes else None


def _last_tagged(text: str) -> str | None:
    for opening, closing in reversed(list(pairwise(_ANSWER_TAG.finditer(text)))):
        if not opening.group(1) and closing.group(1):
            return text[opening.end() : closing.start()].strip()
    return None
