r"""The final answer of a text, without its marker.

    final_answer("so 6*7 = \\boxed{42}")  ->  "42"

Looked for in this order; of a kind that occurs several times, the last counts:

1. `\boxed{...}`, nested braces included, the last one that is complete
2. `<answer>...</answer>`
3. `#### ...`, up to the end of the line
4. "the answer is ...", "answer: ...", "答案是...", up to the end of the sentence
5. the whole text, where it is nothing but a number

What stands before `</think>` is not read: thoughts are no answer. Neither is what stands more than 10,000 characters
before the end.
"""

import re
from itertools import pairwise

from rewards.math.latex import tidy
from rewards.math.number import read_number

# A final answer stands at the end, and every search below is then bounded, whatever the length of the text.
TAIL_CHARACTERS = 10_000

_BRACE = re.compile(r"\\\\|\\[{}]|\\boxed\s*\{|[{}]")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"#{4,}[ \t]*([^\n]+)")
_SENTENCE = re.compile(
    r"\banswer(?:\s+is\b)?\s*:\s*|\banswer\s+is\b\s*|答案\s*[是为]?\s*[:：]\s*|答案\s*[是为]\s*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?:[.!](?=\s|$)|。).*", re.DOTALL)


def final_answer(text: str, *, boxed_only: bool = False) -> str | None:
    """The final answer, stripped, or None; `boxed_only` takes no other marker than `\\boxed{...}`."""
    text = text[-TAIL_CHARACTERS:].rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is not None or boxed_only:
        return boxed
    tagged = _last_tagged(text)
    if tagged is not None:
        return tagged
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip()
    for sentence in reversed(list(_SENTENCE.finditer(text))):
        line = text[sentence.end() :].partition("\n")[0]
        if line.strip():
            return _SENTENCE_END.sub("", line.strip()).strip()
    whole = text.strip()
    return whole if len(whole) <= 64 and read_number(tidy(whole)) else None


def _last_boxed(text: str) -> str | None:
    opened: list[int] = []  # where the content of each open brace begins; -1 for a brace that is not boxed
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
