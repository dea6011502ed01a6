"""How the words of an environment become tokens, so that what a model has read stays the beginning of what it reads.

    a base model      the text as it is, behind the tokens of the model's turn
    a chat model      first messages and the start of an answer; then what its chat template puts between an answer and
                      the next one, around the environment's words, which are a user's

Nothing is rendered twice: a turn of the model stays in the history token by token as it was drawn.
"""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

Messages = list[dict[str, Any]]

_ANSWER = "An answer."  # what stands for the model's turn where only what follows it is looked for


class Turns:
    """The words of both sides for one tokenizer.

    Args:
        eos_token_ids: with which the model ends a turn.
        template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: the chat template changes earlier turns, and TRL has none for training in its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int], **template_kwargs: Any):
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._template_kwargs = template_kwargs
        self._template: str | None = None  # the tokenizer's own
        self._is_chat = tokenizer.chat_template is not None
        if self._is_chat and not self._keeps_beginnings():
            self._template = _training_template(tokenizer)
            if self._template is None or not self._keeps_beginnings():
                raise ValueError(
                    "The chat template of this model changes a turn of the assistant once another one follows, so what "
                    "it has read would not stay the beginning of what it reads. TRL has no template for training in "
                    "its place: set tokenizer.chat_template to one that leaves earlier turns as they are."
                )

    def opening(self, observation: str | Messages) -> list[int]:
        """Token ids of the first words of an environment: a text or, for a chat model, messages."""
        if not self._is_chat:
            return self._tokenizer(text=observation)["input_ids"]
        messages = [_user(observation)] if isinstance(observation, str) else observation
        return self._ids(self._render(messages, add_generation_prompt=True))

    def reply(self, observation: str, last: int) -> list[int]:
        """Token ids of what stands between two turns of the model, the first of which ended with the token `last`."""
        if not self._is_chat:
            return self._ids(observation)
        messages = [_user("?"), _assistant(_ANSWER), _user(observation)]
        ids = self._ids(self._render(messages, add_generation_prompt=True).partition(_ANSWER)[2])
        if last in self._eos_token_ids and last in ids:  # the end of the turn, which the model wrote itself
            return ids[ids.index(last) + 1 :]
        return ids

    def text(self, ids: list[int]) -> str:
        """What the model said, for the environment."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _keeps_beginnings(self) -> bool:
        """Whether an answer is rendered in the same way as the last one and with another turn behind it."""
        one = self._render([_user("?"), _assistant(_ANSWER)])
        two = self._render([_user("?"), _assistant(_ANSWER), _user("?")], add_generation_prompt=True)
        return two.partition(_ANSWER)[0] == one.partition(_ANSWER)[0]

    def _render(self, messages: Messages, **options: Any) -> str:
        options |= self._template_kwargs
        return self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False, **options)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text=text, add_special_tokens=False)["input_ids"]


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # it knows no such template
        return None


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
