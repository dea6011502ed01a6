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

from grpo_ext.data.programs import PROGRAM_FORMAT, with_supported_tests
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


def main(argv: list[str]) -> None:
    prepare_process()
    script_args, args, model_args = parse_arguments(
        argv, "coding", HERE, embedded="tiny_coding.yaml", arguments=RecipeArguments
    )
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = build_problems(script_args, args, tokenizer, PROGRAM_FORMAT)
    name = f"'{script_args.dataset_name}'"
    (train, heldout), left_out = with_supported_tests(name, problems.train, problems.heldout)
    note = f"{problems.note}; {left_out}" if left_out else problems.note
    problems = replace(problems, train=train, heldout=heldout, note=note)
    trainer = build_trainer(program_reward, problems, tokenizer, args, model_args, algorithm=script_args.algorithm)
    train_and_report(trainer, problems, program_reward, recipe="coding", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
