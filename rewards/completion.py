"""What TRL passes to a reward as a completion: a string, or messages `[{"role": "assistant", "content": "..."}]`."""

from collections.abc import Mapping, Sequence

Completion = str | Sequence[Mapping[str, object]]


def text_of(completion: Completion) -> str:
    """The string itself, or the content of the last message; "" if that is not text (a tool call, an empty list)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""
