"""Tokenise a dialogue turn by turn, so that earlier tokens never change: they stay a prefix of the whole dialogue.

    base model      the environment's text as it is, appended to the tokens of the model's turn
    chat model      first the rendered messages and the start of an assistant turn; then, per reply, whatever the chat
                    template puts between two assistant turns, with the environment's text as a user message

No turn is rendered twice: a turn of the model stays in the history exactly as sampled, token for token.
"""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

Messages = list[dict[str, Any]]

_ANSWER = "An answer."  # placeholder for the model's turn, to find what the template puts around it


class TurnTokenizer:
    """Encodes the environment's side of a dialogue and decodes the model's side.

    Args:
        eos_token_ids: tokens with which the model ends a turn.
        template_kwargs: further arguments for the chat template.

    Raises:
        ValueError: the chat template changes earlier turns, and TRL has no training template to replace it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int], **template_kwargs: Any):
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._template_kwargs = template_kwargs
        self._template: str | None = None  # None: that of the tokenizer
        self._is_chat = tokenizer.chat_template is not None
        if self._is_chat and not self._preserves_prefix():
            self._template = _training_template(tokenizer)
            if self._template is None or not self._preserves_prefix():
                raise ValueError(
                    "The chat template of this model changes an assistant turn once another turn follows, so earlier "
                    "tokens would not stay a prefix of the dialogue, and TRL has no training template to replace it. "
                    "Set tokenizer.chat_template to one that leaves earlier turns unchanged."
                )

    def encode_first(self, observation: str | Messages) -> list[int]:
        """Token ids of the environment's first observation: a text or, for a chat model, messages."""
        if not self._is_chat:
            return self._tokenizer(text=observation)["input_ids"]
        messages = [_user(observation)] if isinstance(observation, str) else observation
        return self._ids(self._render(messages, add_generation_prompt=True))

    def encode_reply(self, observation: str, last: int) -> list[int]:
        """Token ids between two turns of the model, the first of which ended with the token `last`."""
        if not self._is_chat:
            return self._ids(observation)
        messages = [_user("?"), _assistant(_ANSWER), _user(observation)]
        ids = self._ids(self._render(messages, add_generation_prompt=True).partition(_ANSWER)[2])
        if last in self._eos_token_ids and last in ids:  # the model ended the turn itself
            return ids[ids.index(last) + 1 :]
        return ids

    def decode(self, ids: list[int]) -> str:
        """A turn of the model as text, for the environment."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _preserves_prefix(self) -> bool:
        """Whether the template renders the text before an answer in the same way if another turn follows the answer."""
        as_last = self._render([_user("?"), _assistant(_ANSWER)])
        followed = self._render([_user("?"), _assistant(_ANSWER), _user("?")], add_generation_prompt=True)
        return followed.partition(_ANSWER)[0] == as_last.partition(_ANSWER)[0]

    def _render(self, messages: Messages, **options: Any) -> str:
        options |= self._template_kwargs
        return self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False, **options)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text=text, add_special_tokens=False)["input_ids"]


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL has no training template for it
        return None


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
