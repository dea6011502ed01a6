"""Prompts and completions as readable text: messages become plain text, long texts are shortened in the middle."""

from typing import Any

from grpo_ext.data import ANSWER_COLUMNS
from grpo_ext.rewards.math.final_answer import extract_final_answer

MAX_CHARACTERS = 2000  # per recorded prompt or completion
MAX_VALUE_CHARACTERS = 300  # per recorded final answer, and per value that a reward logs


def to_text(message: Any) -> str:
    """Plain text unchanged; for messages their content, with a role before each if there are several."""
    if isinstance(message, str):
        return message
    if len(message) == 1:
        return _content(message[0])
    return "\n".join(f"[{part.get('role', '')}] {_content(part)}" for part in message)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):  # a list of parts, such as an image and a text
        content = " ".join(part.get("text") or f"[{part.get('type')}]" for part in content)
    calls = message.get("tool_calls")
    return f"{content} {calls}".strip() if calls else content


def shorten(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text; without its middle if it has more than `limit` characters, because the answer is at the end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[{len(text) - limit} characters left out]\n{text[-(limit // 2) :]}"


def gold_answer(example: dict[str, Any]) -> str | None:
    """The gold answer of a row of the data, from the first of `ANSWER_COLUMNS` that it has; None if it has none."""
    gold = next((example[name] for name in ANSWER_COLUMNS if example.get(name) is not None), None)
    return None if gold is None else shorten(str(gold))


def final_answer_text(text: str) -> str | None:
    """The final answer that the math reward finds in a completion; None if none is marked."""
    found = extract_final_answer(text)
    return None if found is None else shorten(found, MAX_VALUE_CHARACTERS)
