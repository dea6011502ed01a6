"""Problems for a run, with a prompt and a gold answer per row.

In: a data set (`files.py`) whose columns are recognised or given by name (`shapes.py`). Out: training and held-out
`Dataset`s with columns `prompt` and `answer`, ready for TRL. For a base model, text in a column `prompt` is unchanged.

    {"question": "538+478=?", "answer": "1016"}
    -> {"prompt": "Question: 538+478=?\\nAnswer:", "answer": "1016"}                                a base model
    -> {"prompt": [{"role": "system", ...}, {"role": "user", "content": "538+478=?"}], ...}        a chat model
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from grpo_ext.data.cells import answer_of, describe_unreadable, is_messages, question_of, unreadable_rows
from grpo_ext.data.files import load_splits
from grpo_ext.data.shapes import Shape, find_shape
from grpo_ext.model.chat import end_token_ids, why_not_chat

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = "Reason step by step, and put the final answer within \\boxed{}."
PLAIN_PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a problem becomes a prompt.

    Attributes:
        system: system message for a chat model.
        plain: prompt for a base model, with `{question}` in it.
        question: makes the question from the text of its column and the whole row; None to use the text unchanged.
        needs_answer: whether the reward reads a gold answer; False if it reads other columns, such as tests.
    """

    system: str = SYSTEM_PROMPT
    plain: str = PLAIN_PROMPT
    question: Callable[[str, dict[str, Any]], str] | None = None
    needs_answer: bool = True


DEFAULT_FORMAT = PromptFormat()


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The rows to train on and the held-out rows. No prompt is in both, unless `note` says so.

    Attributes:
        train, heldout: columns `prompt` (text or messages), `answer` (text), and the other columns of the data.
        note: in plain words, the source of the held-out rows, the rows left out, and the choices made by default.
    """

    train: Dataset
    heldout: Dataset
    note: str


def load_problems(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    max_heldout: int = 256,
    seed: int = 0,
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    chat: str = "auto",
    unreadable_gold: str = "error",
    reads_gold: Callable[[str], bool] | None = None,
) -> Problems:
    """Load the data, format prompts and answers, and separate held-out problems from the training data.

    Args:
        name: a data set of the Hub, a local file or a folder, see `load_splits`.
        tokenizer: the model's tokenizer.
        config: config of a Hub data set; by default the first one (`main` for gsm8k).
        train_split: name of the training split; ignored if the data has only one split.
        test_split: name of the split of the held-out rows. If there is none, held-out rows are taken out of the
            training data, up to a fifth of it.
        max_heldout: maximum number of held-out rows.
        seed: seed of the choice of held-out rows.
        prompt_format: how problems become prompts.
        prompt_column, answer_column: see `find_shape`.
        chat: whether prompts become messages, see `is_chat`.
        unreadable_gold: what to do with rows that cannot be judged: "error" refuses the data, "drop" leaves them out.
        reads_gold: tells whether the reward can read a gold answer; None if it can read any.

    Raises:
        SystemExit: the data is neither on disk nor reachable on the Hub.
        ValueError: there are no rows, too few to hold some out, no column for the prompt or the answer, or rows that
            cannot be judged.
    """
    splits = load_splits(name, config)
    train_split = splits.only_or(train_split)
    as_chat = is_chat(tokenizer, chat)
    notes: list[str] = [splits.note] if splits.note else []

    def formatted(split: str) -> Dataset:
        rows, note = format_rows(
            splits.pick(split, "--dataset_train_split"),
            tokenizer,
            f"split {split!r} of '{name}'" if len(splits.rows) > 1 else f"'{name}'",
            prompt_format,
            prompt_column=prompt_column,
            answer_column=answer_column,
            as_chat=as_chat,
            unreadable_gold=unreadable_gold,
            reads_gold=reads_gold,
        )
        if note:
            notes.append(note)
        return rows

    train = formatted(train_split)
    if test_split in splits.rows and test_split != train_split:
        heldout = sample_rows(formatted(test_split), max_heldout, seed)
        note = f"{len(heldout)} problems of split '{test_split}'"
        train, left_out = _without_copies(train, heldout)
    else:
        size = min(max_heldout, len(train) // 5)
        if size == 0:
            raise ValueError(f"'{name}' has {len(train)} rows and no split {test_split!r}: too few to hold some out.")
        parts = train.train_test_split(test_size=size, seed=seed)
        rest, heldout = parts["train"], parts["test"]
        prompts = sorted({str(prompt) for prompt in train["prompt"]})
        if len(prompts) > 1 and 2 * len(_others(rest, heldout)) < len(rest):  # few prompts, each in many rows
            chosen = set(prompts[:: max(5, -(-len(prompts) // size))])
            heldout = train.filter(lambda prompt: str(prompt) in chosen, input_columns="prompt")
            train = train.filter(lambda prompt: str(prompt) not in chosen, input_columns="prompt")
            heldout, left_out = sample_rows(heldout, size, seed), ", with all rows of their prompts"
        else:
            train, left_out = _without_copies(rest, heldout)
        size = len(heldout)
        note = f"{size} problems taken out of split '{train_split}'"
    return Problems(train=train, heldout=heldout, note="; ".join([note + left_out, *notes]))


def sample_rows(rows: Dataset, limit: int, seed: int) -> Dataset:
    """Up to `limit` rows, chosen with `seed`: for a test split, the rows that a run with this seed holds out."""
    return rows.shuffle(seed=seed).select(range(min(limit, len(rows))))


def is_chat(tokenizer: PreTrainedTokenizerBase, chat: str) -> bool:
    """Whether prompts become messages.

    Args:
        chat: "true", "false", or "auto". "auto" tells chat models from base models with `why_not_chat`, and logs the
            reason if a model with a chat template counts as a base model.

    Raises:
        ValueError: another value; or "true", and the tokenizer has no chat template.
    """
    chat = str(chat).lower()  # YAML reads true and false as booleans
    if chat not in ("auto", "true", "false"):
        raise ValueError(f"--chat {chat} is unknown; valid: auto, true, false.")
    if chat == "true" and tokenizer.chat_template is None:
        raise ValueError("--chat true needs a chat template, but the tokenizer has none. Type --chat false.")
    if chat != "auto":
        return chat == "true"
    reason = why_not_chat(tokenizer, end_token_ids(tokenizer))
    if reason is not None and tokenizer.chat_template is not None:
        logger.warning(
            "The model counts as a base model and gets plain prompts: %s. Type --chat true for chat messages.", reason
        )
    return reason is None


def judged_rows(
    rows: Dataset,
    name: str,
    *,
    needs_answer: bool = True,
    judges_answers: bool = True,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    unreadable_gold: str = "error",
    reads_gold: Callable[[str], bool] | None = None,
) -> tuple[Dataset, Shape, str]:
    """The rows that can be judged, unchanged; their shape; and a note on the rows left out.

    Args:
        name: name of the data, for error messages.
        needs_answer: whether data without a column for the answer is refused.
        judges_answers: whether a row needs a readable answer if there is a column for it.
        prompt_column, answer_column, unreadable_gold, reads_gold: see `load_problems`.

    Raises:
        ValueError: there is no column for the prompt or the answer, or some or all rows cannot be judged.
    """
    shape = find_shape(
        rows.column_names,
        name,
        prompt_column=prompt_column,
        answer_column=answer_column,
        needs_answer=needs_answer,
        features=rows.features,
    )
    bad = unreadable_rows(rows, shape, judges_answers=judges_answers, reads_gold=reads_gold)
    note = ""
    if bad:
        found = describe_unreadable(bad, len(rows), name)
        if unreadable_gold == "error" or len(bad) == len(rows):
            way_out = "Correct them" + ("" if len(bad) == len(rows) else ", or type --unreadable_gold drop")
            raise ValueError(
                f"{found}. {way_out}. Valid gold answers: a text, a number, or a list of one of them. For mathematics: "
                f"a number, a LaTeX expression, a list, or up to five words, alone or marked by \\boxed{{...}} or #### "
                f"..."
            )
        note = f"{found} and were left out"
        rows = rows.select([i for i in range(len(rows)) if i not in bad])
    return rows, shape, note


def format_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    *,
    needs_answer: bool | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    as_chat: bool | None = None,
    unreadable_gold: str = "error",
    reads_gold: Callable[[str], bool] | None = None,
) -> tuple[Dataset, str]:
    """The rows with columns `prompt` and `answer`, in addition to their other columns; and a note on the rows left out.

    Args:
        name: name of the data, for error messages.
        needs_answer: whether data without a column for the answer is refused; by default that of the format. If the
            format needs an answer and there is none, a chat model gets no system message.
        as_chat: whether prompts become messages; by default the result of `is_chat` for "auto".
        prompt_column, answer_column, unreadable_gold, reads_gold: see `load_problems`.

    Raises:
        ValueError: there is no column for the prompt or the answer, or some or all rows cannot be judged.
    """
    rows, shape, note = judged_rows(
        rows,
        name,
        needs_answer=prompt_format.needs_answer if needs_answer is None else needs_answer,
        judges_answers=prompt_format.needs_answer,
        prompt_column=prompt_column,
        answer_column=answer_column,
        unreadable_gold=unreadable_gold,
        reads_gold=reads_gold,
    )
    as_chat = is_chat(tokenizer, "auto") if as_chat is None else as_chat
    has_system = shape.answer is not None or not prompt_format.needs_answer
    system = [{"role": "system", "content": prompt_format.system}] if has_system else []
    is_prompt = shape.prompt.casefold() == "prompt"

    def formatted(row: dict[str, Any]) -> dict[str, Any]:
        """The formatted prompt of a row, and its answer as text if it has one."""
        row = {original.get(column, column): value for column, value in row.items()}
        question = question_of(row, shape)
        prompt: Any
        if is_messages(question):
            prompt = question if as_chat else prompt_format.plain.format(question=_as_text(question, name))
        else:
            assert isinstance(question, str)
            if prompt_format.question is not None:
                question = prompt_format.question(question, row)
            if as_chat:
                prompt = [*system, {"role": "user", "content": question}]
            else:
                prompt = question if is_prompt else prompt_format.plain.format(question=question)
        return {"prompt": prompt} | ({"answer": answer_of(row, shape)} if shape.answer else {})

    replaced = (shape.prompt, shape.answer, "prompt", "answer")
    taken = [column for column in rows.column_names if column in replaced]
    original = {f"data {column}": column for column in taken}  # `map` would keep the type of a column with that name
    rows = rows.rename_columns({column: name for name, column in original.items()})
    return rows.map(formatted, remove_columns=list(original), desc="prompts"), note


def _as_text(messages: Any, name: str) -> str:
    """The messages of a question as one text, for a base model."""
    roles = [message["role"] for message in messages]
    if not all(role in ("system", "user") for role in roles):
        raise ValueError(
            f"Prompts of {name} are chats of several turns ({', '.join(roles)}), and this is a base model. Use a chat "
            f"model, or type --chat true if the model's chat template suits it."
        )
    return "\n\n".join(str(message["content"]) for message in messages)


def _without_copies(train: Dataset, heldout: Dataset) -> tuple[Dataset, str]:
    """The training rows whose prompts are not held out, and a note; all training rows if every prompt is held out."""
    others = _others(train, heldout)
    if len(others) == len(train):
        return train, ""
    if len(others) == 0:
        different = len({str(prompt) for prompt in train["prompt"]})
        return train, (
            f"; every held-out prompt is also trained on ({len(train)} rows with {different} different "
            f"prompt{'s' * (different != 1)}), so this accuracy does not measure new problems"
        )
    return others, f"; {len(train) - len(others)} training rows with the same prompt were left out"


def _others(train: Dataset, heldout: Dataset) -> Dataset:
    seen = {str(prompt) for prompt in heldout["prompt"]}
    return train.filter(lambda prompt: str(prompt) not in seen, input_columns="prompt")
