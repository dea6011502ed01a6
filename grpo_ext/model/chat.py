"""Tokenise a prompt into the ids that the model sees."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


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
