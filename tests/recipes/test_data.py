"""Problems from files and folders: columns, prompts for base and chat models, and what is held out."""

import copy
import gzip
import json
from functools import partial

import pandas
import pytest
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, GenerationConfig

from grpo_ext.checks.prompts import warnings_of_template
from grpo_ext.data import SYSTEM_PROMPT, PromptFormat, load_problems, reads_gold, refuse_unread_tests

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
    assert problems.train[0]["prompt"].endswith("+1=?")  # a column named `prompt` is used as it is
    assert isinstance(problems.train[0]["answer"], str)


def test_a_folder_with_a_test_file_keeps_it_apart(tmp_path, tokenizer):
    write(tmp_path / "data" / "train.jsonl", ROWS)
    write(tmp_path / "data" / "test.jsonl", [*ROWS[:2], {"question": "0+0=?", "answer": "0"}])
    problems = load_problems(str(tmp_path / "data"), tokenizer)
    assert len(problems.heldout) == 3
    assert len(problems.train) == 48  # without the two that are in the test file
    assert problems.note == "3 problems of split 'test'; 2 training rows with the same prompt were left out"


def with_template(tokenizer, end):
    """The tokenizer with a chat template that ends a turn with this text."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return own


@pytest.mark.parametrize(
    ("end", "chat", "is_messages"),
    [
        ("eos", "auto", True),
        ("<|im_end|>", "auto", False),  # Qwen2.5 base: the template ends turns with a token that does not end its text
        ("", "auto", False),
        ("<|im_end|>", "true", True),
        ("eos", "false", False),
    ],
)
def test_chat_or_base_is_told_by_the_end_of_a_turn(tmp_path, tokenizer, caplog, end, chat, is_messages):
    """Otherwise a base model that ships a chat template would get system and user turns, which it never ends."""
    own = with_template(tokenizer, tokenizer.eos_token if end == "eos" else end)
    row = load_problems(write(tmp_path / "d.jsonl", ROWS), own, chat=chat).train[0]
    if is_messages:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["prompt"][0]["content"] == SYSTEM_PROMPT
        assert row["prompt"][1]["content"].endswith("+1=?")
    else:
        assert row["prompt"].startswith("Question: ")
    assert ("counts as a base model" in caplog.text) == (chat == "auto" and not is_messages)


def test_end_tokens_of_the_generation_config_count(tmp_path, tokenizer):
    """Gemma and Llama-3 end a turn with a token that only the generation config names, not the tokenizer."""
    own = with_template(tokenizer, "7")
    own.save_pretrained(tmp_path / "model")
    (seven,) = own("7", add_special_tokens=False)["input_ids"]
    path = write(tmp_path / "d.jsonl", ROWS)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(load_problems(path, loaded).train[0]["prompt"], str)
    GenerationConfig(eos_token_id=[own.eos_token_id, seven]).save_pretrained(tmp_path / "model")
    assert isinstance(load_problems(path, loaded).train[0]["prompt"], list)


def test_no_template_warning_for_plain_prompts_of_a_base_model(tokenizer):
    """Otherwise a base model with plain prompts would be told to use a chat template that it was not trained on."""
    for end, warned in (("<|im_end|>", False), (tokenizer.eos_token, True)):
        found = warnings_of_template(with_template(tokenizer, end), "Question: 1+1=?", {}, {tokenizer.eos_token_id})
        assert bool(found) == warned


def test_messages_of_the_data(tmp_path, tokenizer):
    """A chat model gets them as they are, a base model only their text, so several turns are an error."""
    turns = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "m.jsonl", [{"prompt": turns, "answer": "1"}] * 10)
    assert load_problems(path, with_template(tokenizer, tokenizer.eos_token)).heldout[0]["prompt"] == turns
    assert load_problems(path, tokenizer).heldout[0]["prompt"] == "Question: hi\nAnswer:"
    many = [*turns, {"role": "assistant", "content": "hello"}, *turns]
    with pytest.raises(ValueError, match=r"several turns \(user, assistant, user\).*--chat true"):
        load_problems(write(tmp_path / "n.jsonl", [{"prompt": many, "answer": "1"}] * 10), tokenizer)


def chat_of(i):
    return [{"role": "user", "content": f"P{i}"}]


SHAPES = {
    "aime": (lambda i: {"ID": str(i), "Problem": f"P{i}", "Answer": i}, "P{}", "{}"),
    "verl": (lambda i: {"prompt": chat_of(i), "reward_model": {"ground_truth": str(i), "style": "rule"}}, "P{}", "{}"),
    "alpaca": (lambda i: {"instruction": "Add 1.", "input": f"{i}", "output": str(i)}, "Add 1.\n\n{}", "{}"),
    "gsm8k": (lambda i: {"question": f"P{i}", "answer": f"so\n#### {i}"}, "P{}", "so\n#### {}"),
    "math": (lambda i: {"problem": f"P{i}", "solution": f"\\boxed{{{i}}}"}, "P{}", "\\boxed{{{}}}"),
    "olympiad": (lambda i: {"question": f"P{i}", "solution": "long", "final_answer": [str(i)]}, "P{}", "{}"),
    "floats": (lambda i: {"question": f"P{i}", "answer": float(i)}, "P{}", "{}"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_shapes_need_no_flags(tmp_path, tokenizer, shape):
    """Otherwise each would be rejected for its column names, or its answers would become the text of a list."""
    row, prompt, answer = SHAPES[shape]
    rows = load_problems(write(tmp_path / "d.jsonl", [row(i) for i in range(30)]), tokenizer).train
    found = {(r["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"), r["answer"]) for r in rows}
    assert len(found) == 24
    assert found <= {(prompt.format(i), answer.format(i)) for i in range(30)}


def test_flags_name_the_columns(tmp_path, tokenizer):
    rows = [{"extra": {"q": f"P{i}"}, "gold": i, "answer": "no"} for i in range(10)]
    path = write(tmp_path / "d.jsonl", rows)
    problems = load_problems(path, tokenizer, prompt_column="extra.q", answer_column="gold", max_heldout=2)
    assert set(problems.train["answer"]) < {str(i) for i in range(10)}
    assert problems.train[0]["prompt"].startswith("Question: P")
    with pytest.raises(ValueError, match=r"--answer_column glod: .* it has: extra, gold, answer"):
        load_problems(path, tokenizer, prompt_column="extra.q", answer_column="glod")


CODE = {
    "mbpp_full": {"text": "Add.", "code": "x", "test_list": ["assert f(1) == 2"]},
    "humaneval": {"prompt": "def f():", "test": "def check(candidate): ...", "entry_point": "f"},
    "apps": {"question": "q", "input_output": "{}"},
    "livecodebench": {"question_content": "q", "public_test_cases": "[]"},
    "kodcode": {"question": "q", "solution": "s", "test": "def test_f(): ..."},
    "code_contests": {"description": "q", "public_tests": {"input": ["1"], "output": ["2"]}},
    "open_r1": {"prompt": "q", "verification_info": {"language": "python", "test_cases": []}},
    "no tests": {"prompt": "q", "solution": "s"},
}


@pytest.mark.parametrize("shape", CODE)
def test_a_code_reward_needs_tests_and_no_answer(tmp_path, tokenizer, shape):
    """Data without an answer column is accepted, and data without tests is refused with the columns to give."""
    row = CODE[shape]
    rows = [
        {name: f"{text}{i}" if name != "test" and isinstance(text, str) else text for name, text in row.items()}
        for i in range(10)
    ]
    path = write(tmp_path / "d.jsonl", rows)
    problems = load_problems(path, tokenizer, prompt_format=PromptFormat(needs_answer=False))
    assert len(problems.train) == 8
    if shape != "no tests":
        refuse_unread_tests(problems.train.column_names, path)
    else:
        with pytest.raises(ValueError, match=r"has no tests for the code reward, which reads .*, or test_list, or"):
            refuse_unread_tests(problems.train.column_names, path)


def test_countdown_is_refused_with_what_to_type(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"target": 9, "nums": [2, 3, 4]}] * 10)
    with pytest.raises(ValueError, match=r"Countdown.*grpo-ext train logic --dataset_name countdown"):
        load_problems(path, tokenizer)


HOLES = {
    "null": (lambda i: {"answer": None}, "answer is missing"),
    "blank": (lambda i: {"answer": "  "}, "answer is empty"),
    "several": (lambda i: {"answer": [str(i), "2"]}, "answer is a list of 2"),
    "none": (lambda i: {"answer": []}, "answer is a list of 0"),
    "question": (lambda i: {"question": None}, "question is missing"),
    "unreadable": (lambda i: {"answer": "we leave the proof to the reader, who will see it"}, "answer cannot be read"),
}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_cannot_be_judged(tmp_path, tokenizer, hole, split):
    """`str()` would turn them into the gold answers "None" and "['256']", and reward a model for writing None."""
    change, reason = HOLES[hole]
    is_list = hole in ("several", "none")
    rows = [{"question": f"{i}?", "answer": [str(i)] if is_list else str(i)} for i in range(30)]
    holed = [row | change(i) if i % 10 == 3 else row for i, row in enumerate(rows)]
    for name in ("train", "test"):
        questions_of = [
            r | {"question": r["question"] and name + r["question"]} for r in (holed if name == split else rows)
        ]
        write(tmp_path / "data" / f"{name}.jsonl", questions_of)
    load = partial(load_problems, str(tmp_path / "data"), tokenizer, reads_gold=reads_gold)
    with pytest.raises(ValueError, match=rf"3 of 30 rows of split '{split}' .*rows 3, 13, 23.*{reason}.*_gold drop"):
        load()
    problems = load(unreadable_gold="drop")
    kept = {"train": problems.train, "test": problems.heldout}
    assert {name: len(rows) for name, rows in kept.items()} == {"train": 30, "test": 30} | {split: 27}
    assert f"3 of 30 rows of split '{split}'" in problems.note
    assert "were left out" in problems.note
    assert all(answer.isdigit() for rows in kept.values() for answer in rows["answer"])


def test_numbers_from_a_spreadsheet(tmp_path, tokenizer):
    """If some numbers are missing, pandas turns these into NaN and the whole numbers into floats."""
    frame = pandas.DataFrame({"question": [f"{i}?" for i in range(30)], "answer": [None, *range(1, 30)]})
    frame.to_parquet(tmp_path / "d.parquet")
    problems = load_problems(str(tmp_path / "d.parquet"), tokenizer, unreadable_gold="drop")
    assert {*problems.train["answer"], *problems.heldout["answer"]} == {str(i) for i in range(1, 30)}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(separator):
    return "question,answer\n".replace(",", separator) + "".join(f"{i}?{separator}{i}\n" for i in range(30))


THIRTY = [{"question": f"{i}?", "answer": str(i)} for i in range(30)]
FILES = {
    "d.json": json.dumps(THIRTY),
    "d.JSONL": lines(THIRTY),
    "d.jsonl.gz": lines(THIRTY),
    "d.JSONL.GZ": lines(THIRTY),
    "d.csv": table(","),
    "d.CSV.gz": table(","),
    "d.tsv": table("\t"),
    "d.tsv.gz": table("\t"),
    "folder/train.jsonl.gz": lines(THIRTY),
    "folder/train.tsv": table("\t"),
    "folder/train.JSONL": lines(THIRTY),
}


@pytest.mark.parametrize("name", FILES)
def test_files_and_folders(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(FILES[name].encode()) if name.lower().endswith(".gz") else FILES[name].encode())
    problems = load_problems(str(path if path.parent == tmp_path else path.parent), tokenizer)
    assert sorted([*problems.train["answer"], *problems.heldout["answer"]], key=int) == [str(i) for i in range(30)]


def test_folders_of_save_to_disk(tmp_path, tokenizer):
    """For these, `datasets` asks for `load_from_disk`, which a flag cannot call."""
    rows = Dataset.from_list(THIRTY)
    rows.save_to_disk(tmp_path / "one")
    rows.train_test_split(test_size=5, seed=0).save_to_disk(tmp_path / "both")
    for split in ("train", "test"):
        rows.save_to_disk(tmp_path / "folders" / split)
    sizes = {}
    for name in ("one", "both", "folders"):
        problems = load_problems(str(tmp_path / name), tokenizer)
        sizes[name] = len(problems.train), len(problems.heldout)
    assert sizes == {"one": (24, 6), "both": (25, 5), "folders": (30, 30)}


@pytest.mark.parametrize("prompts", [1, 2, 10])
def test_few_prompts_in_many_rows(tmp_path, tokenizer, prompts):
    """Removing the copies of held-out prompts must not empty the training data."""
    rows = [{"question": f"Write a haiku {i % prompts}.", "answer": "1"} for i in range(30)]
    problems = load_problems(write(tmp_path / "d.jsonl", rows), tokenizer)
    shared = questions(problems.train) & questions(problems.heldout)
    assert bool(shared) == (prompts == 1) == ("held-out prompt is also trained on" in problems.note)
    assert len(problems.train) >= 15
    assert len(problems.heldout) == 6


def test_one_split_is_that_split(tmp_path, tokenizer):
    write(tmp_path / "data" / "validation.jsonl", THIRTY)
    assert len(load_problems(str(tmp_path / "data"), tokenizer).train) == 24


def test_bad_data_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"column for the prompt.*it has: text, answer"):
        load_problems(write(tmp_path / "a.jsonl", [{"text": "x", "answer": "1"}] * 10), tokenizer)
    with pytest.raises(
        ValueError, match=r"column for the answer, one of: answer, .*it has: question. Name another one with --answer"
    ):
        load_problems(write(tmp_path / "b.jsonl", [{"question": "x"}] * 10), tokenizer)
    with pytest.raises(ValueError, match="3 rows and no split 'test': too few"):
        load_problems(write(tmp_path / "c.jsonl", ROWS[:3]), tokenizer)
    with pytest.raises(ValueError, match=r"suffix '.txt'; valid: .jsonl"):
        load_problems(write(tmp_path / "d.txt", ROWS), tokenizer)
    for split in ("train", "test"):
        write(tmp_path / "e" / f"{split}.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no split 'dev'; it has: train, test\. Add --dataset_train_split train"):
        load_problems(str(tmp_path / "e"), tokenizer, train_split="dev")
    with pytest.raises(SystemExit, match="Data set 'nobody/nothing' is not a local path"):
        load_problems("nobody/nothing", tokenizer)


def test_the_name_on_the_hub_stays_with_the_rows(monkeypatch, tokenizer, tmp_path):
    """For the model card of a run; `datasets` itself keeps only `gsm8k` of `openai/gsm8k`."""
    splits = load_dataset("json", data_files={"train": write(tmp_path / "d.jsonl", ROWS)})
    monkeypatch.setattr("grpo_ext.data.files.load_dataset", lambda name, config: splits)
    problems = load_problems("openai/gsm8k", tokenizer, config="main")
    assert problems.train.info.dataset_name == "openai/gsm8k"


def test_the_first_config_of_the_hub_is_named(monkeypatch, tokenizer, tmp_path):
    """If it is chosen by default, the banner must say so."""
    splits = load_dataset("json", data_files={"train": write(tmp_path / "d.jsonl", ROWS)})
    monkeypatch.setattr("grpo_ext.data.files.load_dataset", lambda name, config: splits)
    monkeypatch.setattr("grpo_ext.data.files.get_dataset_config_names", lambda name: ["main", "socratic"])
    assert "config 'main', the first of 2" in load_problems("openai/gsm8k", tokenizer).note
