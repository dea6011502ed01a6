r"""Extracts the final answer of a text, without its marker.

    extract_final_answer("so 6*7 = \\boxed{42}")  ->  "42"

The first marker of this list that occurs wins. If it occurs several times, the last one counts:

1. `\boxed{...}` with its nested braces; an incomplete one does not count
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
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASH_LINE = re.compile(r"#{4,}[ \t]*([^\n]+)")
_ANSWER_PHRASE = re.compile(
    r"\banswer(?:\s+is\b)?\s*:\s*|\banswer\s+is\b\s*|答案\s*[是为]?\s*[:：]\s*|答案\s*[是为]\s*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?:[.!](?=\s|$)|。).*", re.DOTALL)


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
        return tagged
    if hashes := _HASH_LINE.findall(text):
        return hashes[-1].strip()
    for sentence in reversed(list(_ANSWER_PHRASE.finditer(text))):
        line = text[sentence.end() :].partition("\n")[0]
        if line.strip():
            return _SENTENCE_END.sub("", line.strip()).strip()
    whole = text.strip()
    return whole if len(whole) <= 64 and parse_number(normalize(whole)) else None


def _last_boxed(text: str) -> str | None:
    opened: list[int] = []  # start of the content of each open brace; -1 if the brace is not that of a \boxed
    begin, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace.group().startswith("\\boxed"):
            opened.append(brace.end())
        elif brace.group() == "{":
            opened.append(-1)
        elif brace.group() == "}" and opened and (closed := opened.pop()) > begin:
            begin, end = closed, brace.start()
    return None if begin < 0 else text[begin:end].strip()


def _last_tagged(text: str) -> str | None:
    for opening, closing in reversed(list(pairwise(_ANSWER_TAG.finditer(text)))):
        if not opening.group(1) and closing.group(1):
            return text[opening.end() : closing.start()].strip()
    return None
