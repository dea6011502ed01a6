"""Teach a small model to reason: GRPO with LoRA on problems whose answers can be checked.

    accelerate launch recipes/math.py       in a checkout
    grpo-ext train math                     wherever the package is installed

Without arguments, it trains the embedded 0.87M-parameter model on three-digit sums, offline, on two CPU cores in a
minute or two. The model can work out a sum digit by digit, but usually answers at once and wrongly; the rewards alone
teach it to work sums out. recipes/README.md has the measured results.

    accelerate launch recipes/math.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k \
        --load_in_4bit --max_steps 500

Every field of GRPOExtConfig, of TRL's ModelConfig and of RecipeArguments (grpo_ext/recipe.py) is a flag, and may be set
in a YAML file given by `--config`; flags win.
"""

import os
import sys

# Python puts the folder of a script first on sys.path, and `import math` would find this file there.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != HERE]

from grpo_ext import GRPOExtConfig
from grpo_ext.data import reads_gold
from grpo_ext.model.load import PolicyConfig, load_tokenizer
from grpo_ext.recipe import (
    RecipeArguments,
    build_problems,
    build_trainer,
    parse_arguments,
    prepare_process,
    train_and_report,
)
from grpo_ext.rollout.reward_workers import in_workers
from grpo_ext.rewards import math_answer_reward


def parse(argv: list[str]) -> tuple[RecipeArguments, GRPOExtConfig, PolicyConfig]:
    """The arguments of this run; those of tiny_math.yaml if `argv` has no model, data set or config file."""
    return parse_arguments(argv, "math", HERE, embedded="tiny_math.yaml", arguments=RecipeArguments)


def main(argv: list[str]) -> None:
    prepare_process()
    script_args, args, model_args = parse(argv)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = build_problems(script_args, args, tokenizer, reads_gold=reads_gold)
    reward = in_workers(math_answer_reward, args.reward_workers, args.reward_timeout)
    trainer = build_trainer(reward, problems, tokenizer, args, model_args, algorithm=script_args.algorithm)
    train_and_report(trainer, problems, reward, recipe="math", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
