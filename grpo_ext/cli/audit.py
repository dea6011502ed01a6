"""`grpo-ext audit --data problems.jsonl`: is the reward right on this data, and hard to cheat?"""

import argparse
import inspect
import sys
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from grpo_ext.cli.data_arguments import add_data_arguments
from grpo_ext.cli.load_reward import load_reward
from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show

if TYPE_CHECKING:
    from grpo_ext.rewards.audit import Check, Timing

SHOWN_CHARACTERS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_data_arguments(parser, split="train")
    parser.add_argument(
        "--reward",
        default="grpo_ext.rewards:math_answer_reward",
        help="the reward function as module:name; default: %(default)s",
    )
    parser.add_argument(
        "--form",
        action="append",
        help="how a right completion states its answer, with {} for the answer; repeat it for more forms; default: "
        "'#### {}' and other usual forms",
    )
    parser.add_argument("--rows", type=int, default=50, help="number of rows to test, picked with --seed; default: 50")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the rows and of the wrong answers; default: %(default)s"
    )


def run(options: argparse.Namespace) -> None:
    """Print the table of `grpo_ext.rewards.audit`; exit with 1 if gold answers do not earn 1.0."""
    quiet_libraries()
    from grpo_ext.data import answer_of, judged_rows, load_splits, question_of, reads_gold, sample_rows
    from grpo_ext.rewards import MathAnswerReward
    from grpo_ext.rewards.audit import ANSWER_FORMS, audit

    splits, reward = load_splits(options.data), load_reward(options.reward)
    found, shape, note = judged_rows(
        splits.pick(splits.only_or(options.split), "--split"),
        f"'{options.data}'",
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        unreadable_gold=options.unreadable_gold,
        reads_gold=reads_gold if isinstance(inspect.unwrap(reward), MathAnswerReward) else None,
    )
    for text in filter(None, (splits.note, note)):
        print(text, file=sys.stderr)
    rows = sample_rows(found, options.rows, options.seed).to_list()
    rows = [row | {"prompt": question_of(row, shape), "answer": answer_of(row, shape)} for row in rows]
    checks, seconds = audit(reward, rows, forms=options.form or ANSWER_FORMS, seed=options.seed)
    _show(checks, seconds, f"{options.reward} on {len(rows)} rows of {options.data}")
    if any(check.is_fatal and check.failed for check in checks):
        sys.exit("Gold answers do not earn 1.0: a run with this reward on this data would learn the wrong thing.")


def _show(checks: "list[Check]", seconds: "Timing", title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("completions", "expected score", "mean score", "unexpected"):
        table.add_column(column)
    for check in checks:
        judged = [score for score in check.scores if score is not None]
        mean = f"{sum(judged) / len(judged):.2f}" if judged else "not judged"
        failed = Text(f"{len(check.failed)} of {len(check.scores)}", "red") if check.failed else Text("none", "green")
        table.add_row(Text(check.name), check.expected, mean, failed)
    show(table)
    for check in checks:
        for completion, score in check.failed[:1]:
            show(f"{check.name}: {completion[-SHOWN_CHARACTERS:]!r} earned {score}")
    show(f"time per completion: mean {seconds.mean * 1000:.2f} ms, maximum {seconds.slowest * 1000:.0f} ms")
