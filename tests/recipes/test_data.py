"""Problems from files and folders: columns, prompts for base and chat models, and what is held out."""

import json

import pandas
import pytest
from datasets import load_dataset

from grpo_ext.data import SYSTEM_PROMPT, load_problems

ROWS = [{"question": f"{i}+1=?", "answer": str(i + 1)} for i in range(50)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(rows):
    return set(rows["prompt"])


def test_a_file_is_split_and_prompted_for_a_base_model(tmp_path, tokenizer):
    problems = load_problems(write(tmp_path / "d.jsonl", ROWS), tokenizer, max_heldout=256)
    assert len(problems.heldout) == 10  # a fifth
    assert len(problems.train) == 40
    assert not questions(problems.train) & questions(problems.heldout)
    row = problems.train[0]
    number = row["prompt"].removeprefix("Question: ").partition("+")[0]
    assert row == {"prompt": f"Question: {number}+1=?\nAnswer:", "answer": str(int(number) + 1)}
    assert problems.note == "10 problems taken out of split 'train'"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_formats_and_column_names(tmp_path, tokenizer, suffix):
    frame = pandas.DataFrame([{"prompt": r["question"], "solution": r["answer"], "level": 3} for r in ROWS])
    path = tmp_path / f"d.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    problems = load_problems(str(path), tokenizer)
    assert problems.train[0].keys() == {"prompt", "answer", "level"}
    assert problems.train[0]["prompt"].endswith("+1=?")  # a prompt is a prompt: as it is
    assert isinstance(problems.train[0]["answer"], str)


def test_a_folder_with_a_test_file_keeps_it_apart(tmp_path, tokenizer):
    write(tmp_path / "data" / "train.jsonl", ROWS)
    write(tmp_path / "data" / "test.jsonl", [*ROWS[:2], {"question": "0+0=?", "answer": "0"}])
    problems = load_problems(str(tmp_path / "data"), tokenizer)
    assert len(problems.heldout) == 3
    assert len(problems.train) == 48  # the two that the test file shares
    assert problems.note == "3 problems of split 'test'; 2 training rows with the same prompt were left out"


def test_chat_models_get_messages(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    try:
        path = write(tmp_path / "d.jsonl", ROWS)
        prompt = load_problems(path, tokenizer).train[0]["prompt"]
        messages = [{"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}] * 10
        kept = load_problems(write(tmp_path / "m.jsonl", messages), tokenizer).heldout[0]["prompt"]
    finally:
        tokenizer.chat_template = None
    assert prompt[0] == {"role": "system", "content": SYSTEM_PROMPT}
    assert prompt[1]["role"] == "user"
    assert prompt[1]["content"].endswith("+1=?")
    assert kept == [{"role": "user", "content": "hi"}]


def test_bad_data_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"column for the prompt.*it has: text, answer"):
        load_problems(write(tmp_path / "a.jsonl", [{"text": "x", "answer": "1"}] * 10), tokenizer)
    with pytest.raises(ValueError, match=r"column for the answer, one of: answer, solution.*it has: question"):
        load_problems(write(tmp_path / "b.jsonl", [{"question": "x"}] * 10), tokenizer)
    with pytest.raises(ValueError, match="3 rows and no split 'test': too few"):
        load_problems(write(tmp_path / "c.jsonl", ROWS[:3]), tokenizer)
    with pytest.raises(ValueError, match=r"suffix '.txt'; valid: .jsonl"):
        load_problems(write(tmp_path / "d.txt", ROWS), tokenizer)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train"):
        load_problems(write(tmp_path / "e.jsonl", ROWS), tokenizer, train_split="dev")
    with pytest.raises(SystemExit, match="Data set 'nobody/nothing' is not a local path"):
        load_problems("nobody/nothing", tokenizer)


def test_the_name_on_the_hub_stays_with_the_rows(monkeypatch, tokenizer, tmp_path):
    """For the card of a run; `datasets` itself keeps `gsm8k` of `openai/gsm8k`."""
    splits = load_dataset("json", data_files={"train": write(tmp_path / "d.jsonl", ROWS)})
    monkeypatch.setattr("grpo_ext.data.load_dataset", lambda name, config: splits)
    problems = load_problems("openai/gsm8k", tokenizer, config="main")
    assert problems.train.info.dataset_name == "openai/gsm8k"
