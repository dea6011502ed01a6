"""Problems for a run: a data set from the Hub or from local files, with a prompt and a gold answer per row.

In: `openai/gsm8k`, `problems.jsonl`, or a folder with train and test files; columns `prompt`, `question` or `problem`,
and `answer`, `solution` or `code`. Out: train and held-out `Dataset`s with `prompt` and `answer`, ready for TRL. For a
base model, text in a column `prompt` is not changed.

    {"question": "538+478=?", "answer": "1016"}
    -> {"prompt": "Question: 538+478=?\\nAnswer:", "answer": "1016"}                                a base model
    -> {"prompt": [{"role": "system", ...}, {"role": "user", "content": "538+478=?"}], ...}        a chat model
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from grpo_ext.model.load import unreachable_message

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution", "code")
SYSTEM_PROMPT = "Reason step by step, and put the final answer within \\boxed{}."
PLAIN_PROMPT = "Question: {question}\nAnswer:"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a problem becomes a prompt.

    Attributes:
        system: system message for a chat model.
        plain: prompt for a base model, with `{question}` in it.
        question: makes the question from the text of its column and the whole row; None to take the text as it is.
    """

    system: str = SYSTEM_PROMPT
    plain: str = PLAIN_PROMPT
    question: Callable[[str, dict[str, Any]], str] | None = None


DEFAULT_FORMAT = PromptFormat()


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The rows to train on and the held-out rows; no prompt is in both.

    Attributes:
        train, heldout: columns `prompt` (text or messages), `answer` (text), and the other columns of the data.
        note: where the held-out rows come from, in plain words.
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
) -> Problems:
    """Load the data, format prompts and answers, and separate held-out problems from the training data.

    Args:
        name: a data set of the Hub, a local file (.jsonl, .json, .csv, .parquet) or a folder of such files.
        tokenizer: with a chat template the prompts become messages, else plain text.
        config: of a Hub data set; by default its first one (`main` for gsm8k).
        max_heldout: the number of held-out rows, drawn with `seed`, or all rows of the `test_split` if it has fewer.
            Without a `test_split`, held-out rows are taken out of the training data, at most a fifth of it.
        prompt_format: how problems become prompts.

    Raises:
        SystemExit: the data is neither on disk nor reachable on the Hub.
        ValueError: no rows, too few to hold some out, or no column for the prompt or the answer.
    """
    splits = load_splits(name, config)
    if train_split not in splits:
        raise ValueError(f"'{name}' has no split {train_split!r}; it has: {', '.join(splits)}.")
    train = splits[train_split]
    if len(train) == 0:
        raise ValueError(f"Split {train_split!r} of '{name}' has no rows.")
    if test_split in splits and test_split != train_split:
        heldout = splits[test_split].shuffle(seed=seed)
        heldout = heldout.select(range(min(max_heldout, len(heldout))))
        note = f"{len(heldout)} problems of split '{test_split}'"
    else:
        size = min(max_heldout, len(train) // 5)
        if size == 0:
            raise ValueError(f"'{name}' has {len(train)} rows and no split {test_split!r}: too few to hold some out.")
        parts = train.train_test_split(test_size=size, seed=seed)
        train, heldout = parts["train"], parts["test"]
        note = f"{size} problems taken out of split '{train_split}'"
    train, heldout = (format_rows(rows, tokenizer, name, prompt_format) for rows in (train, heldout))
    seen = {str(prompt) for prompt in heldout["prompt"]}
    before = len(train)
    train = train.filter(lambda prompt: str(prompt) not in seen, input_columns="prompt")
    if len(train) < before:
        note += f"; {before - len(train)} training rows with the same prompt were left out"
    return Problems(train=train, heldout=heldout, note=note)


def sample_rows(name: str, split: str, limit: int, seed: int) -> Dataset:
    """Up to `limit` rows of one split, drawn with `seed`; the same ones that a run with this seed holds out.

    Raises:
        SystemExit, ValueError: as `load_problems`.
    """
    splits = load_splits(name)
    if split not in splits:
        raise ValueError(f"'{name}' has no split {split!r}; it has: {', '.join(splits)}. Add --split NAME.")
    rows = splits[split].shuffle(seed=seed)
    return rows.select(range(min(limit, len(rows))))


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """Every split of a data set from the Hub, a local file or a folder; `config` as for `load_problems`.

    Raises:
        SystemExit, ValueError: as `load_problems`.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"'{name}' has suffix {path.suffix!r}; valid: {', '.join(FILE_FORMATS)}.")
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path))
    try:
        if config is None and not path.is_dir():
            config = get_dataset_config_names(name)[0]
        splits = load_dataset(name, config)
    except (ConnectionError, DatasetNotFoundError, OSError) as error:
        raise SystemExit(unreachable_message("Data set", name, error)) from None
    if not path.is_dir():
        for rows in splits.values():
            rows.info.dataset_name = name  # `datasets` drops the owner
    return splits


def format_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    *,
    needs_answer: bool = True,
) -> Dataset:
    """The rows with columns `prompt` and `answer`, in addition to their other columns.

    Args:
        name: of the data, for error messages.
        needs_answer: False for rewards that use other columns; rows may then lack an answer, in which case a chat model
            gets no system message.

    Raises:
        ValueError: no column for the prompt or the answer.
    """
    prompt_column = _find_column(PROMPT_COLUMNS, rows, "prompt", name)
    has_answer = needs_answer or not set(ANSWER_COLUMNS).isdisjoint(rows.column_names)
    answer_column = _find_column(ANSWER_COLUMNS, rows, "answer", name) if has_answer else None
    is_chat, is_prompt = tokenizer.chat_template is not None, prompt_column == "prompt"
    system = [{"role": "system", "content": prompt_format.system}] if has_answer else []

    def formatted(row: dict[str, Any]) -> dict[str, Any]:
        """The formatted prompt of a row, and its answer as text if it has one."""
        text = row[prompt_column]
        if isinstance(text, str) and prompt_format.question is not None:
            text = prompt_format.question(text, row)
        if not isinstance(text, str):
            prompt = text  # messages already
        elif is_chat:
            prompt = [*system, {"role": "user", "content": text}]
        else:
            prompt = text if is_prompt else prompt_format.plain.format(question=text)
        return {"prompt": prompt} | ({"answer": str(row[answer_column])} if answer_column else {})

    columns = [prompt_column, *([answer_column] if answer_column else [])]
    return rows.map(formatted, remove_columns=columns, desc="prompts")


def _find_column(candidates: tuple[str, ...], rows: Dataset, role: str, name: str) -> str:
    for column in candidates:
        if column in rows.column_names:
            return column
    raise ValueError(
        f"'{name}' needs a column for the {role}, one of: {', '.join(candidates)}; "
        f"it has: {', '.join(rows.column_names)}."
    )
