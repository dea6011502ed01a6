"""A prompt as the token ids that the model sees."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], **template: Any
) -> list[int]:
    """Token ids of a prompt exactly as TRL's trainer makes them: chat template for messages, plain text otherwise.

    Args:
        template: further arguments of the chat template, the config's `chat_template_kwargs`.
    """
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return rendered["input_ids"]
