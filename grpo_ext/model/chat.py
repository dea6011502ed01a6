"""Tokenise a prompt into the ids that the model sees, and tell chat models from base models.

A base model may ship a chat template: that of Qwen2.5 ends a turn with `<|im_end|>`, which does not end the text of the
base model. So a model is a chat model if the end of a turn in its template is one of its end-of-sequence tokens.
"""

from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

EXAMPLE_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], **template: Any
) -> list[int]:
    """Token ids of a prompt, identical to those of TRL's trainer: chat template for messages, plain text otherwise.

    Args:
        template: further arguments of the chat template (`chat_template_kwargs` of the config).
    """
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return rendered["input_ids"]


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processing class, which is one itself or a processor that holds one."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an answer, as in TRL: those of the tokenizer and of its model's generation config."""
    ends: Any = None
    if tokenizer.name_or_path:
        try:
            ends = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
        except (OSError, ValueError):  # without that file, transformers derives it from the config of the model
            try:
                ends = AutoConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
            except (OSError, ValueError, AttributeError):
                ends = None
    ids = set(ends) if isinstance(ends, list) else {ends}
    return {id for id in (*ids, tokenizer.eos_token_id) if id is not None}


def end_of_turn(tokenizer: PreTrainedTokenizerBase, **template: Any) -> str | None:
    """What the chat template writes after the last message; None if it cannot render a question and its answer."""
    try:
        text = tokenizer.apply_chat_template(EXAMPLE_CHAT, tokenize=False, **template)
    except (TemplateError, TypeError):
        return None
    return text.rpartition(EXAMPLE_CHAT[-1]["content"])[2]


def why_not_chat(tokenizer: PreTrainedTokenizerBase, ends: set[int], **template: Any) -> str | None:
    """Why a model that has this tokenizer is a base model; None if it is a chat model.

    Args:
        ends: ids of the tokens that end an answer.
        template: further arguments of the chat template.
    """
    if tokenizer.chat_template is None:
        return "its tokenizer has no chat template"
    after = end_of_turn(tokenizer, **template)
    if after is None or ends.intersection(tokenizer(text=after, add_special_tokens=False)["input_ids"]):
        return None
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends)))) or "none"
    return f"its chat template ends a turn with {after.strip()!r}, and its end-of-sequence tokens are: {names}"
