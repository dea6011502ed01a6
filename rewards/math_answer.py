r"""1.0 where the final answer of a completion equals the gold answer, 0.0 where it does not.

    math_answer_reward(["so 6*7 = \\boxed{42}", "#### 41"], answer=["42", "42"])  ->  [1.0, 0.0]

The final answer is the last of the first kind found: `\boxed{...}`, `<answer>...</answer>`, `#### ...`,
"the answer is ..." / "答案是...", or the whole text where it is nothing but a number. Numbers are compared exactly as
fractions; everything else by Math-Verify, for symbolic equality.
"""

import logging
import re
import threading
from fractions import Fraction

from math_verify import parse, verify
from math_verify.errors import TimeoutException

Completion = str | list[dict[str, str]]

# A longer answer is wrong: a final answer is short, and the time that Math-Verify takes grows with its length.
MAX_ANSWER_CHARACTERS = 256
# Seconds for each step of one symbolic comparison. Math-Verify's limit works in the main thread only.
COMPARISON_SECONDS = 3

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SENTENCE = re.compile(r"(?:\banswer is:?|答案[是为][:：]?)[ \t]*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?:[.!](?=\s|$)|。).*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_SEVERAL = re.compile(r"\b(?:or|and)\b|或|;", re.IGNORECASE)


def math_answer_reward(completions: list[Completion], answer: list[str], **columns: object) -> list[float | None]:
    """Score completions by symbolic equality of their final answer with the gold one.

    Args:
        completions: strings, or chat completions `[{"role": "assistant", "content": ...}]`; of the latter the last
            message counts.
        answer: the gold answers, one a completion: a bare answer, or a solution that marks its answer as above
            (gsm8k's `... #### 42`).
        columns: the other columns of the data, unused.

    Returns:
        1.0 right, 0.0 wrong or no final answer, None where the gold answer is empty or cannot be read.
    """
    return [_score(_text(completion), str(gold)) for completion, gold in zip(completions, answer, strict=True)]


def final_answer(text: str) -> str | None:
    """The final answer of a text, stripped of its marker, or None; the order of markers is the module's."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_ANSWER_TAG, _HASHES, _SENTENCE):
        found = pattern.findall(text)
        if found:
            answer = found[-1].strip()
            return _SENTENCE_END.sub("", answer).strip() if pattern is _SENTENCE else answer
    return text.strip() if _as_fraction(text) is not None else None


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else ""


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last complete `\\boxed{...}`; nested braces count."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position].strip()
        start = text.rfind("\\boxed{", 0, start)  # this one was cut off: look further ahead
    return None


def _score(text: str, gold: str) -> float | None:
    gold_answer = final_answer(gold) or gold.strip()
    if not gold_answer:
        return None
    answer = final_answer(text)
    if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
        gold_is_readable = _as_fraction(gold_answer) is not None or _parse(gold_answer)
        return 0.0 if gold_is_readable else None
    expected, received = _as_fraction(gold_answer), _as_fraction(answer)
    if expected is not None and received is not None:
        return float(expected == received)
    parsed_gold = _parse(gold_answer)
    if not parsed_gold:
        return None
    if _SEVERAL.search(answer) and not _SEVERAL.search(gold_answer):
        return 0.0  # several candidates are no answer
    parsed_answer = _parse(answer)
    return float(bool(parsed_answer) and _verify(parsed_gold, parsed_answer))


def _as_fraction(text: str) -> Fraction | None:
    """A plain number, maybe with thousands separators, a currency sign, an exponent or a unicode minus; else None."""
    number = text.strip().strip("$").replace("\\$", "").replace("\u2212", "-").rstrip(".").strip()
    if not number or len(number) > MAX_ANSWER_CHARACTERS or not _NUMBER.fullmatch(number):
        return None
    digits = number.replace(",", "")
    return Fraction(digits) if digits.lstrip("+-.")[:1].isdigit() else None


def _seconds() -> int | None:
    return COMPARISON_SECONDS if threading.current_thread() is threading.main_thread() else None


def _parse(answer: str) -> list[object]:
    try:
        return parse(f"\\boxed{{{answer}}}", fallback_mode="no_fallback", parsing_timeout=_seconds())
    except (Exception, TimeoutException):  # whatever a model wrote, an answer that cannot be read is not right
        return []


def _verify(gold: list[object], answer: list[object]) -> bool:
    try:
        return bool(verify(gold, answer, timeout_seconds=_seconds()))
    except (Exception, TimeoutException):
        return False


# Math-Verify warns at every call off the main thread that its time limit is off; `_seconds` chose that knowingly.
logging.getLogger("math_verify").setLevel(logging.ERROR)
