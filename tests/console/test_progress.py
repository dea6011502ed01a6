"""One progress display in every run: ours, the user's own, or the table of a notebook."""

import re

import pytest
import transformers.trainer
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import RichProgressCallback

from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS


class Mine(ProgressCallback):
    """A progress bar of the user's own."""


class Lines(PrinterCallback):
    """The user's own line per log."""


class Table(TrainerCallback):
    """Takes the place of transformers' table in a notebook, which needs IPython."""


DISPLAYS = (ProgressCallback, RichProgressCallback, PrinterCallback, Table)


def displays_of(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DISPLAYS)]


@pytest.mark.parametrize(
    ("given", "disable_tqdm"),
    [
        (Mine(), False),
        (Mine, False),
        (ProgressCallback(), False),
        (RichProgressCallback(), False),
        (Lines(), True),
        (PrinterCallback(), True),
    ],
)
def test_a_display_of_the_user_is_the_only_one(build, small_model, given, disable_tqdm):
    """Removing the first bar in the list would remove the user's, and leave transformers' and ours side by side."""
    trainer = build(small_model, beta=0.0, disable_tqdm=disable_tqdm, arguments={"callbacks": [given]})
    (display,) = displays_of(trainer)
    assert display is given or type(display) is given


@pytest.mark.parametrize("given", [None, [], [TrainerCallback()]])
@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_without_one_there_is_ours(build, small_model, given, disable_tqdm):
    trainer = build(small_model, beta=0.0, disable_tqdm=disable_tqdm, arguments={"callbacks": given})
    (display,) = displays_of(trainer)
    assert isinstance(display, PrinterCallback if disable_tqdm else ProgressCallback)
    assert type(display) not in (PrinterCallback, ProgressCallback)


@pytest.mark.parametrize(("given", "kept"), [(None, Table), ([Mine()], Mine)])
def test_a_notebook_keeps_its_table(build, small_model, monkeypatch, given, kept):
    """Guards against our bar below transformers' table, and against a bar left behind by each evaluation."""
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", Table)
    trainer = build(small_model, beta=0.0, disable_tqdm=False, arguments={"callbacks": given})
    assert [type(display) for display in displays_of(trainer)] == [kept]


def screen(written):
    """The lines on a terminal at the end."""
    lines, at = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[A)", written):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[A":
            at -= 1
        elif part != "\r":  # every other part begins at the left
            lines[at] = part + lines[at][len(part) :]
    return lines


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_what_is_left_on_the_screen(build, small_model, capsys, disable_tqdm):
    """There is one bar with the reward, or one line per log. An evaluation leaves no bar behind, during a run or after
    it."""
    trainer = build(
        small_model,
        disable_tqdm=disable_tqdm,
        peft_config=random_lora(),
        eval_strategy="steps",
        eval_steps=1,
        arguments={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
    )
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    if disable_tqdm:
        assert [line for line in out.splitlines() if "'reward': '" in line and "'loss': '" in line]
        assert "%|" not in err
    else:
        (bar,) = [line for line in screen(err) if "%|" in line]
        assert "2/2" in bar
        assert "reward=" in bar
