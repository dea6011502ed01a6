"""Tokenise a prompt into the ids that the model sees, and tell chat models from base models.

A base model may ship a chat template, as Qwen2.5 does: its template ends a turn with `<|im_end|>`, which is not an
end-of-sequence token of the base model. A model therefore counts as a chat model only if its template ends a turn with
one of its end-of-sequence tokens.
"""

from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

EXAMPLE_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], **template: Any
) -> list[int]:
    """Token ids of a prompt, identical to those in TRL's trainer: chat template for messages, plain text otherwise.

    Args:
        template: further arguments for the chat template (`chat_template_kwargs` of the config).
    """
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return rendered["input_ids"]


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer that a processing class either is, or contains if it is a processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an answer, as in TRL: those of the tokenizer and of its model's generation config."""
    ends: Any = None
    if tokenizer.name_or_path:
        try:
            ends = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
        except (OSError, ValueError):  # no such file: use the model's config, as transformers does
            try:
                ends = AutoConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
            except (OSError, ValueError, AttributeError):
                ends = None
    ids = set(ends) if isinstance(ends, list) else {ends}
    return {id for id in (*ids, tokenizer.eos_token_id) if id is not None}


def end_of_turn(tokenizer: PreTrainedTokenizerBase, **template: Any) -> str | None:
    """What the chat template writes after the last message; None if it cannot render a question and an answer."""
    try:
        text = tokenizer.apply_chat_template(EXAMPLE_CHAT, tokenize=False, **template)
    except (TemplateError, TypeError):
        return None
    return text.rpartition(EXAMPLE_CHAT[-1]["content"])[2]


def why_not_chat(tokenizer: PreTrainedTokenizerBase, ends: set[int], **template: Any) -> str | None:
    """The reason why a model with this tokenizer counts as a base model, as text for a log; None for a chat model.

    Args:
        ends: ids of the tokens that end an answer.
        template: further arguments for the chat template.
    """
    if tokenizer.chat_template is None:
        return "its tokenizer has no chat template"
    after = end_of_turn(tokenizer, **template)
    if after is None or ends.intersection(tokenizer(text=after, add_special_tokens=False)["input_ids"]):
        return None
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends)))) or "none"
    return f"its chat template ends a turn with {after.strip()!r}, which is not an end-of-sequence token ({names})"
