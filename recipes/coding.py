"""Teach a model to program: GRPO with LoRA on problems whose programs are run in a sandbox.

    accelerate launch recipes/coding.py --config recipes/mbpp_qlora.yaml     in a checkout
    grpo-ext train coding --config mbpp_qlora.yaml                           wherever the package is installed

This needs one GPU of 12 GB or more; it has not been measured yet, so no result is given. It also needs bubblewrap
(`apt install bubblewrap`); rewards/code/sandbox.py says what the sandbox stops and what it does not.

Without arguments, it trains the embedded model on the 40 problems of recipes/tiny_coding.jsonl, offline, in a minute.
This only shows that everything is installed: the model knows nothing but sums, so every program is wrong and nothing is
learnt (held-out pass@1: 0.00).

Data: a question with either `entry_point`, `inputs` and `outputs`, or `stdin` and `stdout`, or `test_list`, or the
columns of HumanEval, LeetCode, APPS, TACO, LiveCodeBench, CodeContests, open-r1 or KodCode (rewards/code/formats.py).
No gold answer is needed. Rows with a test that cannot be converted are left out. Every field of GRPOExtConfig, of
TRL's ModelConfig and of RecipeArguments (grpo_ext/recipe.py) is a flag, and may be set in a YAML file given by
`--config`; flags win.
"""

import os
import sys

# Python puts the folder of a script first on sys.path, and `import math` would find math.py there.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != HERE]

from dataclasses import replace
from typing import Any

from grpo_ext.data import Problems, PromptFormat, refuse_unread_tests
from grpo_ext.model.load import load_tokenizer
from grpo_ext.recipe import (
    RecipeArguments,
    build_problems,
    build_trainer,
    parse_arguments,
    prepare_process,
    train_and_report,
)
from grpo_ext.rewards import program_reward


def question(text: str, row: dict[str, Any]) -> str:
    """The task, with one of its tests if only the tests name the function."""
    tests = row.get("test_list")
    return f"{text}\nYour program must pass this test:\n{tests[0]}" if tests else text


PROMPT_FORMAT = PromptFormat(
    system="Write the program that is asked for, in one block fenced as ```python.",
    plain="{question}\nThe program in Python:\n",
    question=question,
    needs_answer=False,
)


def can_be_judged(row: dict[str, Any]) -> bool:
    """Whether the reward supports the tests of a row. Nothing is run, since the program is empty."""
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    try:
        return program_reward([""], **columns) != [None]
    except ValueError:
        return False


def judged(problems: Problems) -> Problems:
    """The problems whose tests the reward supports."""
    train, heldout = (rows.filter(can_be_judged) for rows in (problems.train, problems.heldout))
    dropped = len(problems.train) + len(problems.heldout) - len(train) - len(heldout)
    if not len(train) or not len(heldout):
        raise SystemExit(
            "No problem has tests that the reward supports; rewards/code/formats.py says which columns hold them."
        )
    note = f"; {dropped} problems with unsupported tests were left out" if dropped else ""
    return replace(problems, train=train, heldout=heldout, note=problems.note + note)


def main(argv: list[str]) -> None:
    prepare_process()
    script_args, args, model_args = parse_arguments(
        argv, "coding", HERE, embedded="tiny_coding.yaml", arguments=RecipeArguments
    )
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = build_problems(script_args, args, tokenizer, PROMPT_FORMAT)
    refuse_unread_tests(problems.train.column_names, f"'{script_args.dataset_name}'")
    problems = judged(problems)
    trainer = build_trainer(program_reward, problems, tokenizer, args, model_args, algorithm=script_args.algorithm)
    train_and_report(trainer, problems, program_reward, recipe="coding", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
