"""Teach a model to program: GRPO with LoRA on problems whose programs are run in a sandbox.

    accelerate launch recipes/coding.py --config recipes/mbpp_qlora.yaml

One GPU of 12 GB or more; planned, and not measured yet, so there is no number to expect. It needs bubblewrap
(`apt install bubblewrap`): what the sandbox stops and what it does not stands in rewards/code/sandbox.py.

Without arguments the embedded model is set on the 40 problems of recipes/tiny_coding.jsonl. That shows that everything
is installed and runs, offline and in a minute; the model only knows sums, so every program is wrong and nothing is
learnt (held-out pass@1: 0.00). For anything real give a model.

Data: a question with either `entry_point`, `inputs` and `outputs`, or `stdin` and `stdout`, or `test_list`, see
rewards/code/program.py. Every field of GRPOExtConfig, of TRL's ModelConfig and of RecipeArguments (grpo_ext/recipe.py)
is a flag, or a line of a YAML file that `--config` names; flags win.
"""

import sys

# Started as a script, this folder comes first on sys.path, where `import math` would find the recipe of that name.
HERE = __file__.replace("\\", "/").rpartition("/")[0]
sys.path[:] = [entry for entry in sys.path if entry.replace("\\", "/").rstrip("/") != HERE]

from dataclasses import replace
from typing import Any

from grpo_ext.data import Problems, Wording
from grpo_ext.experiment import run
from grpo_ext.model.load import load_tokenizer
from grpo_ext.recipe import RecipeArguments, begin, build_trainer, find_problems, parse
from rewards import program_reward


def question(text: str, row: dict[str, Any]) -> str:
    """The task, and a test where that alone says what the function is called."""
    tests = row.get("test_list")
    return f"{text}\nYour program must pass this test:\n{tests[0]}" if tests else text


WORDING = Wording(
    system="Write the program that is asked for, in one block fenced as ```python.",
    plain="{question}\nThe program in Python:\n",
    question=question,
)


def can_be_judged(row: dict[str, Any]) -> bool:
    """Whether the tests of a row can be read; an empty program is not run."""
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    try:
        return program_reward([""], **columns) != [None]
    except ValueError:
        return False


def judged(problems: Problems) -> Problems:
    """The problems whose tests can be read."""
    train, heldout = (rows.filter(can_be_judged) for rows in (problems.train, problems.heldout))
    dropped = len(problems.train) + len(problems.heldout) - len(train) - len(heldout)
    if not len(train) or not len(heldout):
        raise SystemExit(
            "No problem has tests that can be judged; rewards/code/program.py says which columns hold them."
        )
    note = f"; {dropped} problems whose tests cannot be judged were left out" if dropped else ""
    return replace(problems, train=train, heldout=heldout, note=problems.note + note)


def main(argv: list[str]) -> None:
    begin()
    script_args, args, model_args = parse(argv, "coding", HERE, embedded="tiny_coding.yaml", arguments=RecipeArguments)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = judged(find_problems(script_args, args, tokenizer, WORDING))
    trainer = build_trainer(program_reward, problems, tokenizer, args, model_args)
    run(trainer, problems, program_reward, recipe="coding", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
