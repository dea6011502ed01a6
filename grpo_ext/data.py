"""Problems for a run: a data set of the Hub or of local files, with a prompt and a gold answer a row.

In: `openai/gsm8k`, `problems.jsonl`, or a folder with train and test files; columns `prompt`, `question` or `problem`,
and `answer`, `solution` or `code`. Out: train and held-out `Dataset`s with `prompt` and `answer`, ready for TRL. A base
model gets a text of column `prompt` as it is.

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
SYSTEM_LINE = "Reason step by step, and put the final answer within \\boxed{}."
PLAIN_PROMPT = "Question: {question}\nAnswer:"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a problem is put to the model.

    Attributes:
        system: of a chat model.
        plain: what a base model reads, with `{question}` in it.
        question: the question itself, from the text of its column and the whole row; None for the text as it is.
    """

    system: str = SYSTEM_LINE
    plain: str = PLAIN_PROMPT
    question: Callable[[str, dict[str, Any]], str] | None = None


USUAL_WORDING = Wording()


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The rows to train on and the rows to evaluate on; no prompt is in both.

    Attributes:
        train, heldout: columns `prompt` (text or messages), `answer` (text) and whatever else the data has.
        note: how the held-out rows came about, in plain words.
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
    wording: Wording = USUAL_WORDING,
) -> Problems:
    """Load, name the columns, write the prompts, and keep held-out problems apart.

    Args:
        name: a data set of the Hub, a local file (.jsonl, .json, .csv, .parquet) or a folder of such files.
        tokenizer: with a chat template the prompts become messages, else plain text.
        config: of a Hub data set; the first one (`main` of gsm8k) where the data has several.
        max_heldout: at most so many held-out rows, drawn with `seed`. Without a `test_split`, so many rows, but at
            most a fifth, are taken out of the training data.
        wording: how the prompts are written.

    Raises:
        SystemExit: not on disk and not reachable on the Hub.
        ValueError: no rows, or no column that could be the prompt or the answer.
    """
    splits = fetch(name, config)
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
    train, heldout = (with_prompts(rows, tokenizer, name, wording) for rows in (train, heldout))
    seen = {str(prompt) for prompt in heldout["prompt"]}
    before = len(train)
    train = train.filter(lambda prompt: str(prompt) not in seen, input_columns="prompt")
    if len(train) < before:
        note += f"; {before - len(train)} training rows with the same prompt were left out"
    return Problems(train=train, heldout=heldout, note=note)


def draw(name: str, split: str, most: int, seed: int) -> Dataset:
    """At most so many rows of one split, in an order drawn with `seed`: that of the held-out problems of a run.

    Raises:
        SystemExit, ValueError: as `load_problems`.
    """
    splits = fetch(name)
    if split not in splits:
        raise ValueError(f"'{name}' has no split {split!r}; it has: {', '.join(splits)}. Add --split NAME.")
    rows = splits[split].shuffle(seed=seed)
    return rows.select(range(min(most, len(rows))))


def fetch(name: str, config: str | None = None) -> DatasetDict:
    """Every split of a data set of the Hub, a local file or a folder; `config` as in `load_problems`.

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
            rows.info.dataset_name = name  # `datasets` leaves the owner out
    return splits


def with_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    wording: Wording = USUAL_WORDING,
    *,
    needs_answer: bool = True,
) -> Dataset:
    """The rows with columns `prompt` and `answer` and whatever else they have.

    Args:
        name: of the data, for errors.
        needs_answer: False for rewards that judge by other columns; then rows may have no answer, and a chat model is
            not told how to write one.

    Raises:
        ValueError: no column that could be the prompt or the answer.
    """
    prompt_column = _first_of(PROMPT_COLUMNS, rows, "prompt", name)
    has_answer = needs_answer or not set(ANSWER_COLUMNS).isdisjoint(rows.column_names)
    answer_column = _first_of(ANSWER_COLUMNS, rows, "answer", name) if has_answer else None
    is_chat, is_prompt = tokenizer.chat_template is not None, prompt_column == "prompt"
    system = [{"role": "system", "content": wording.system}] if has_answer else []

    def write(row: dict[str, Any]) -> dict[str, Any]:
        """The row with its prompt as the model reads it, and its answer as text where it has one."""
        text = row[prompt_column]
        if isinstance(text, str) and wording.question is not None:
            text = wording.question(text, row)
        if not isinstance(text, str):
            prompt = text  # messages already
        elif is_chat:
            prompt = [*system, {"role": "user", "content": text}]
        else:
            prompt = text if is_prompt else wording.plain.format(question=text)
        return {"prompt": prompt} | ({"answer": str(row[answer_column])} if answer_column else {})

    columns = [prompt_column, *([answer_column] if answer_column else [])]
    return rows.map(write, remove_columns=columns, desc="prompts")


def _first_of(candidates: tuple[str, ...], rows: Dataset, role: str, name: str) -> str:
    for column in candidates:
        if column in rows.column_names:
            return column
    raise ValueError(
        f"'{name}' needs a column for the {role}, one of: {', '.join(candidates)}; "
        f"it has: {', '.join(rows.column_names)}."
    )
