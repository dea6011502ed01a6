"""Check the prompts before a run: their number, length and tokens, and whether completions would end.

find_longest(data, tokenizer, {})  ->  (17, [151644, 872, ..., 198])      row and token ids of the longest prompt
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from grpo_ext.model.chat import end_of_turn, tokenize_prompt, why_not_chat

# The longest prompt in tokens is searched among this many of the longest prompts in characters.
CANDIDATES = 32


def columns_of(data: Dataset) -> list[str]:
    """The columns of the rows as TRL reads them: `set_transform` may compute other columns than the stored ones."""
    return data.column_names if data.format["type"] is None else list(data[0])


def values_of(data: Dataset, column: str) -> Sequence[Any]:
    """A column of the rows as TRL reads them; with `set_transform`, read row by row."""
    return data[column][:] if data.format["type"] is None else [data[row][column] for row in range(len(data))]


def check_has_prompts(columns: Sequence[str]) -> None:
    """Check that there is a column `prompt`, which TRL needs.

    Raises:
        ValueError: there is none.
    """
    if "prompt" not in columns:
        raise ValueError(
            f"The training data has no column 'prompt'; it has: {', '.join(columns)}. Rename the one that holds the "
            f"prompts: dataset.rename_column({next(iter(columns), 'question')!r}, 'prompt'). Only with "
            f"environment_factory may the environment give the prompts."
        )


def check_count(prompts: int, rollout: int, num_generations: int) -> None:
    """Check that there are enough prompts for one rollout of `rollout` completions. With fewer, TRL trains no step.

    Raises:
        ValueError: there are too few.
    """
    needed = rollout // num_generations
    if prompts == 0:
        raise ValueError("The training data has no rows.")
    if prompts < needed:
        raise ValueError(
            f"The training data has only {prompts} prompt{'s' * (prompts != 1)}, and one rollout needs {needed} "
            f"({rollout} completions / num_generations={num_generations}). Add prompts, or lower "
            f"per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation."
        )


def without_overlong(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], limit: int, action: str
) -> tuple[Dataset, str | None]:
    """The data without prompts of more than `limit` tokens, and a message with their number (None if there are none).

    Args:
        template: additional arguments of the chat template.
        action: "drop" or "error", the value of `overlong_prompts`.

    Raises:
        ValueError: there are such prompts and `action` is "error", or no other prompts are left.
    """
    lengths = [len(tokenize_prompt(tokenizer, prompt, **template)) for prompt in values_of(data, "prompt")]
    kept = [i for i, tokens in enumerate(lengths) if tokens <= limit]
    if len(kept) == len(data):
        return data, None
    found = f"{len(data) - len(kept)} of {len(data)} prompts are longer than max_prompt_tokens={limit}"
    if action == "error" or not kept:
        way_out = "Raise the limit" if action == "drop" else 'Pass overlong_prompts="drop" or raise the limit'
        raise ValueError(f"{found} (longest {max(lengths)}). {way_out}.")
    return data.select(kept), f"{found} and were left out (longest {max(lengths)})."


def find_longest(data: Dataset, tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]) -> tuple[int, list[int]]:
    """Row and token ids of the longest prompt among the `CANDIDATES` prompts with the most characters."""
    prompts = values_of(data, "prompt")
    rows = sorted(range(len(prompts)), key=lambda row: -len(str(prompts[row])))[:CANDIDATES]
    return max(
        ((row, tokenize_prompt(tokenizer, prompts[row], **template)) for row in rows), key=lambda found: len(found[1])
    )


def check_tokens(longest: list[int], tokenizer: PreTrainedTokenizerBase, config: Any, new_tokens: int | None) -> None:
    """Check that these tokens are in the model's vocabulary, and that it has positions for them and `new_tokens` more.

    Args:
        config: the model's config.
        new_tokens: `max_completion_length`; None if it has no limit.

    Raises:
        ValueError: a token is not in the vocabulary, or the longest prompt and completion exceed the positions.
    """
    text_config = config.get_text_config()
    largest = max([*longest, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0])
    if largest >= text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has a token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has "
            f"only {text_config.vocab_size} tokens. Use the tokenizer of this model, or resize its embeddings."
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and new_tokens is not None and len(longest) + new_tokens > positions:
        raise ValueError(
            f"The longest prompt has {len(longest)} tokens; with max_completion_length={new_tokens} this exceeds the "
            f"model's {positions} positions. Lower max_completion_length, or leave out long prompts: "
            f"max_prompt_tokens={max(1, positions - new_tokens)}, overlong_prompts='drop'."
        )


def warnings_of_template(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, template: dict[str, Any], ends: set[int]
) -> list[str]:
    """Warnings about prompts that bypass the chat template, and about a template that ends turns without an EOS token.

    Args:
        prompt: a prompt of the data.
        ends: ids of the tokens that end a completion.
    """
    if isinstance(prompt, str):
        if why_not_chat(tokenizer, ends, **template) is not None:
            return []  # a base model, which may ship a template
        return [
            "The prompts are plain text, so they bypass the chat template of the tokenizer. For a chat model, make "
            "each prompt a list of messages: [{'role': 'user', 'content': ...}]."
        ]
    after = end_of_turn(tokenizer, **template) or ""
    ids = tokenizer(text=after, add_special_tokens=False)["input_ids"]
    if not ids or ends.intersection(ids):
        return []
    return [
        f"The chat template ends a turn with {after!r}, which contains no token that ends a completion "
        f"({', '.join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends))))}), so completions would run to "
        f"max_completion_length. Set the tokenizer's eos_token, or eos_token_id in the model's generation config."
    ]
