"""The audit of a reward: what it finds in exploitable rewards, and that it fails if gold answers do not pass."""

import json
import os
import shutil

import pytest

from grpo_ext import cli
from grpo_ext.rewards import math_answer_reward
from grpo_ext.rewards.audit import ANSWER_FORMS, audit
from tests.tools.paths import TINY_DATA

ROWS = [{"prompt": f"{a}+{b}=?", "answer": str(a + b)} for a in range(3, 7) for b in (2, 10)]
EXPLOITS = {
    "altered gold answers",
    "empty answers",
    "always the same answer",
    "copied prompt",
    "long text without an answer",
    "several candidates",
}


def always_right(completions, **columns):
    return [1.0] * len(completions)


def contains_the_gold(completions, answer, **columns):
    return [float(gold in text) for text, gold in zip(completions, answer, strict=True)]


def pays_for_length(completions, **columns):
    return [min(0.9, len(text) / 10_000) for text in completions]


def found(reward, rows=ROWS, **settings):
    checks, seconds = audit(reward, rows, **settings)
    assert 0 <= seconds.mean <= seconds.slowest
    assert all(len(check.scores) >= len(check.failed) for check in checks)
    return {check.name for check in checks if check.failed}


@pytest.mark.parametrize(
    ("reward", "failed"),
    [
        (math_answer_reward, set()),
        (always_right, EXPLOITS),
        (contains_the_gold, {"several candidates"}),
        (pays_for_length, {"gold answers", *(f"gold as {form.format('…')}" for form in ANSWER_FORMS[1:])}),
    ],
)
def test_what_it_finds(reward, failed):
    assert found(reward) - {"padded wrong answers"} == failed
    assert ("padded wrong answers" in found(reward)) is (reward is pays_for_length)


def test_altered_answers_differ_from_the_gold():
    """Numbers differ in one digit; words are replaced by those of another row."""
    rows = [{"prompt": "?", "answer": text} for text in ("105", "east", "west")]
    checks, _ = audit(always_right, rows, forms=["{}"])
    (altered,) = (check for check in checks if check.name == "altered gold answers")
    number, east, west = (completion for completion, _ in altered.failed)
    assert len(number) == 3
    assert sum(a != b for a, b in zip(number, "105", strict=True)) == 1
    assert east in ("105", "west")
    assert west in ("105", "east")


def test_the_final_answer_of_a_solution_is_altered():
    rows = [{"prompt": "?", "answer": f"48/2 = 24 and 24*3 = {n}\n#### {n}"} for n in (72, 68)]
    assert found(math_answer_reward, rows, forms=["{}"]) == set()


def test_equal_gold_answers_are_not_several_candidates():
    checks, _ = audit(math_answer_reward, [{"prompt": "?", "answer": "7"}] * 3)
    (candidates,) = (check for check in checks if check.name == "several candidates")
    assert (candidates.scores, candidates.failed) == ([], [])


def test_chat_prompts_get_chat_answers():
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]

    def of_messages(completions, answer, prompts, **columns):
        assert prompts[0][0]["role"] == "user"
        return math_answer_reward([message[-1]["content"] for message in completions], answer)

    assert found(of_messages, rows) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS[:1]}, "two or more rows with the column 'answer'; got 1"),
        ({"gold": "solution"}, "column 'solution'; got 8 with the columns: answer, prompt"),
        ({"forms": ["the answer"]}, r"forms=\['the answer'\]: each form needs a '\{\}'"),
        ({"forms": ["#### {answer}"]}, r"each form needs a '\{\}'"),
        ({"forms": ["\\boxed{}"]}, "other braces are doubled"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        audit(math_answer_reward, **{"rows": ROWS} | changes)


def test_through_its_command_line(capsys, tmp_path):
    """It prints a table and sets the exit code: 0 if gold answers pass, otherwise 1 with one sentence."""
    cli.main(["audit", "--data", str(TINY_DATA), "--rows", "20"])
    output = capsys.readouterr().out
    assert "grpo_ext.rewards:math_answer_reward on 20 rows" in output
    assert output.count("none") == 4 + len(EXPLOITS) + 1
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row | {"answer": "5 or 6"}) + "\n" for row in ROWS))
    with pytest.raises(SystemExit, match=r"Gold answers do not earn 1\.0"):
        cli.main(["audit", "--data", str(data), "--reward", f"{__name__}:pays_for_length"])
    assert "8 of 8" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true",
    reason="bwrap is missing: apt install bubblewrap",
)
def test_programs_through_its_command_line(capsys, tmp_path):
    """Gold programs run like completions; one that fails its own tests is reported."""
    data, tests = tmp_path / "programs.jsonl", {"double": (2, 4), "square": (1, 4), "negated": (-1, -2), "cube": (1, 8)}
    body = {"double": "2 * x", "square": "x * x", "negated": "-x", "cube": "x ** 3"}
    rows = [
        {
            "prompt": f"Write {name}(x).",
            "solution": f"def {name}(x):\n    return {body[name]}",
            "test_list": [f"assert {name}({x}) == {y}" for x, y in zip((1, 2), outputs, strict=True)],
        }
        for name, outputs in tests.items()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(data), "--reward", "grpo_ext.rewards:program_reward", "--gold", "solution", "--form", "{}"]
    cli.main(["audit", *flags, "--form", "```python\n{}\n```"])
    assert capsys.readouterr().out.count("none") == 2 + len(EXPLOITS) + 1
    rows[1]["solution"] = "def square(x):\n    return x * x + 1"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"Gold answers do not earn 1\.0"):
        cli.main(["audit", *flags])
    assert "1 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gold", "nope"], "--answer_column nope: .* has no such column"),
        (["--split", "nope"], "has no split 'nope'; it has: train, test"),
        (["--reward", "grpo_ext.rewards:nope"], "nope"),
        (["--reward", "nope:nope"], "No module named 'nope'"),
    ],
)
def test_mistakes_in_a_command_give_one_sentence(flags, message):
    with pytest.raises(SystemExit, match=f"grpo-ext: .*{message}"):
        cli.main(["audit", "--data", str(TINY_DATA), *flags])
