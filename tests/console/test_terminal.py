"""Streams that cannot take what is printed: the run, command or recipe continues, and its files are correct."""

import contextlib
import io
import json
import os
import pathlib
import sys

import pytest
from datasets import Dataset
from rich.panel import Panel
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.console.terminal import bar, show
from tests.tools.lanes import thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.processes import BIN, launch
from tests.tools.training import SETTINGS

CHINESE = "问题：{0}加{0}等于几？→ 答："


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def closed():
    stream = encoded("utf-8")
    stream.close()
    return stream


def full():
    return pathlib.Path("/dev/full").open("w", encoding="utf-8")


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


STREAMS = {
    "cp1252": lambda: encoded("cp1252"),
    "ascii": lambda: encoded("ascii"),
    "closed": closed,
    "full": full,
    "broken pipe": broken_pipe,
    "none": lambda: None,
}


RUNS = [(name, has_bar) for name in STREAMS for has_bar in (True, False)]
USUAL = ("cp1252", "broken pipe")  # a narrow encoding, and a stream that fails; both with and without a bar


@pytest.fixture
def on(monkeypatch):
    """`on("full")` replaces both standard streams by streams of this kind and returns the new standard output."""
    opened = []

    def replace(name):
        for standard in ("stdout", "stderr"):
            opened.append(STREAMS[name]())
            monkeypatch.setattr(sys, standard, opened[-1])
        return opened[0]

    yield replace
    monkeypatch.undo()
    for stream in opened:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.close()


@pytest.fixture
def chinese_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.add_tokens([*"问题加等于几答：？→"])  # as in every real tokenizer
    return tokenizer


def prints_completions(completions, **columns):
    print("*" * 20, CHINESE, completions[0])
    return [float(len(text)) for text in completions]


def silent(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(("name", "has_bar"), thinned(RUNS, [(name, False) for name in STREAMS if name not in USUAL]))
def test_no_stream_ends_a_run(on, tmp_path, chinese_tokenizer, name, has_bar):
    """On Windows, redirected output is cp1252, in which the panel before the first step, TRL's table of completions, or
    a reward that prints a completion would end the run. On a broken pipe, rich exits the program."""
    settings = SETTINGS | {"max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 8}
    settings |= {"max_completion_length": 8, "eval_strategy": "steps", "eval_steps": 1, "log_completions": True}
    settings |= {"disable_tqdm": not has_bar, "reward_workers": 0, "output_dir": str(tmp_path)}
    data = Dataset.from_dict({"prompt": [CHINESE.format(i) for i in range(8)]})
    trainer = GRPOExtTrainer(
        small_llama(chinese_tokenizer),
        # A broken stream, unlike one of a narrow encoding, raises in any program that prints to it.
        prints_completions if name in ("cp1252", "ascii", "none") else silent,
        GRPOExtConfig(**settings),
        data,
        data.select(range(2)),
        processing_class=chinese_tokenizer,
        peft_config=random_lora(init_lora_weights=True),
    )
    stream = on(name)
    trainer.train()
    assert trainer.state.global_step == 2
    if isinstance(stream, io.TextIOWrapper) and name in ("cp1252", "ascii"):
        printed = stream.buffer.getvalue().decode(name)
        assert printed.count("\\u95ee\\u9898") >= 3  # the panel, the reward, TRL's table
        assert stream.errors == "strict"


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_shown_on_such_a_stream(on, name):
    """Printing the verdict after hours of training must not raise. Whatever can be encoded is printed."""
    stream = on(name)
    show("问 pass@1 0.5")
    show(Panel("naïve [/b] 问 [nan, nan]"))
    for _ in bar(range(3), "问"):
        pass
    if name in ("cp1252", "ascii"):
        printed = stream.buffer.getvalue().decode(name)
        assert "\\u95ee pass@1 0.5\n" in printed
        assert ("naïve" if name == "cp1252" else "na\\xefve") + " [/b] \\u95ee [nan, nan]" in printed


def test_brackets_are_no_markup(capsys):
    """Completions and paths contain brackets, and rich raises if it takes `[/b]` for a closing tag."""
    show(Panel("rewards: [nan, nan] for [/answer] in runs/[a]"))
    show("[bold]as it is[/bold]")
    printed = capsys.readouterr().out
    assert "[nan, nan] for [/answer] in runs/[a]" in printed
    assert "[bold]as it is[/bold]\n" in printed


# Python prints, and opens files, in the encoding of the locale, here ASCII. On Windows it depends on the language.
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}


@pytest.mark.slow
def test_a_recipe_on_chinese_problems(tmp_path):
    """Guards against a table of samples that ends a recipe with exit code 1 instead of the verdict, and, if the locale
    is not UTF-8, against a missing or garbled page."""
    rows = [{"question": f"{CHINESE.format(i)} {i}+{i}", "answer": str(2 * i)} for i in range(40)]
    data, config = tmp_path / "问题.jsonl", tmp_path / "c.yaml"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config.write_text(f"# 问题\nmodel_name_or_path: {TINY_MODEL}\n", encoding="utf-8")
    command = [sys.executable, "-X", "warn_default_encoding", "recipes/math.py", "--config", str(config)]
    command += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    command += ["--max_steps", "1", "--per_device_train_batch_size", "8", "--max_completion_length", "16"]
    command += ["--max_eval_prompts", "8", "--eval_samples", "0", "--save_steps", "1", "--logging_steps", "1"]
    command += ["--reward_workers", "0"]
    code, output = launch(command, **ASCII_LOCALE)
    assert code == 0, output
    assert "held-out pass@1: " in output.strip().splitlines()[-1]
    assert "\\u95ee\\u9898" in output
    ours = [line for line in output.splitlines() if "EncodingWarning" in line and "site-packages" not in line]
    assert not ours, "files that were opened in the encoding of the locale"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "问题" in page


@pytest.mark.parametrize("stream", ["/dev/full", "closed"])
def test_a_command_whose_output_goes_nowhere(tmp_path, stream):
    """With a full disk under the log, Python tries to write once more when it exits, and would exit with an error."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n', encoding="utf-8")
    report = [str(BIN / "python"), "-m", "grpo_ext.cli", "report", str(tmp_path)]
    redirected = ">&-" if stream == "closed" else f"> {stream}"
    code, output = launch(["sh", "-c", f'exec "$@" {redirected}', "sh", *report])
    assert code == 0, output
    assert (tmp_path / "report.html").exists()
