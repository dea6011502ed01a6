"""Prompts and completions as text for people: messages written out, long ones shortened in the middle."""

from typing import Any

from grpo_ext.data import ANSWER_COLUMNS
from rewards.math.final_answer import extract_final_answer

MOST_CHARACTERS = 2000  # of a prompt or a completion in what a run records
MOST_VALUE_CHARACTERS = 300  # of an answer that was found in one, and of what a reward logs beside


def readable(message: Any) -> str:
    """A plain text as it is; of messages the content, under their roles where there are several."""
    if isinstance(message, str):
        return message
    if len(message) == 1:
        return _content(message[0])
    return "\n".join(f"[{part.get('role', '')}] {_content(part)}" for part in message)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):  # parts, such as an image and a text
        content = " ".join(part.get("text") or f"[{part.get('type')}]" for part in content)
    calls = message.get("tool_calls")
    return f"{content} {calls}".strip() if calls else content


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """A long text without its middle: how it begins, and how it ends, where the answer stands."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[{len(text) - most} characters left out]\n{text[-(most // 2) :]}"


def gold_of(example: dict[str, Any]) -> str | None:
    """The right answer of a row of the data, where it has one in `answer` or `solution`."""
    found = next((example[name] for name in ANSWER_COLUMNS if example.get(name) is not None), None)
    return None if found is None else clipped(str(found))


def found_in(text: str) -> str | None:
    """The final answer that a completion gives, as the mathematics reward reads it; None where it marks none."""
    found = extract_final_answer(text)
    return None if found is None else clipped(found, MOST_VALUE_CHARACTERS)
