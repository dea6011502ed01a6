"""Teach a small model to reason: GRPO with LoRA on problems whose answers can be checked.

    accelerate launch recipes/math.py

Without arguments: the embedded 0.87M-parameter model on three-digit sums, offline, on two CPU cores in about two
minutes. It can work a sum out digit by digit, but usually blurts a wrong answer; the rewards alone teach it not to.
What to expect, and the figures that were measured, stand in recipes/README.md.

    accelerate launch recipes/math.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k \
        --load_in_4bit --max_steps 500

Every field of GRPOExtConfig, of TRL's ModelConfig and of RecipeArguments (grpo_ext/recipe.py) is a flag, or a line of a
YAML file that `--config` names; flags win.
"""

import sys

# Started as a script, this folder comes first on sys.path, where `import math` would find this very file.
HERE = __file__.replace("\\", "/").rpartition("/")[0]
sys.path[:] = [entry for entry in sys.path if entry.replace("\\", "/").rstrip("/") != HERE]

from grpo_ext import GRPOExtConfig
from grpo_ext.experiment import run
from grpo_ext.model.load import PolicyConfig, load_tokenizer
from grpo_ext.recipe import RecipeArguments, begin, build_trainer, find_problems
from grpo_ext.recipe import parse as parse_flags
from grpo_ext.rollout.reward_workers import in_workers
from rewards import check_gold, math_answer_reward


def parse(argv: list[str]) -> tuple[RecipeArguments, GRPOExtConfig, PolicyConfig]:
    """The flags of this run; without a model, data or a config file those of tiny_math.yaml."""
    return parse_flags(argv, "math", HERE, embedded="tiny_math.yaml", arguments=RecipeArguments)


def main(argv: list[str]) -> None:
    begin()
    script_args, args, model_args = parse(argv)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = find_problems(script_args, args, tokenizer)
    for rows in (problems.train, problems.heldout):
        check_gold(rows["answer"])
    reward = in_workers(math_answer_reward, args.reward_workers, args.reward_timeout)
    trainer = build_trainer(reward, problems, tokenizer, args, model_args)
    run(trainer, problems, reward, recipe="math", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
