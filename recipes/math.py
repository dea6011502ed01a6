"""Teach a small model to reason: GRPO with LoRA on problems whose answers can be checked.

    accelerate launch recipes/math.py

Without arguments: the embedded 0.87M-parameter model on three-digit sums, offline, on two CPU cores in about two
minutes. It can work a sum out digit by digit, but usually blurts a wrong answer; the rewards alone teach it not to.
What to expect, and the figures that were measured, stand in recipes/README.md.

    accelerate launch recipes/math.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k \
        --load_in_4bit --max_steps 500

Every field of GRPOExtConfig, of TRL's ModelConfig and of MathArguments below is a flag, or a line of a YAML file that
`--config` names; flags win.
"""

import sys

# Started as a script, this folder comes first on sys.path, where `import math` would find this very file.
HERE = __file__.replace("\\", "/").rpartition("/")[0]
sys.path[:] = [entry for entry in sys.path if entry.replace("\\", "/").rstrip("/") != HERE]

import os
from dataclasses import dataclass, field

from trl import ScriptArguments, TrlParser, get_peft_config

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.data import load_problems
from grpo_ext.experiment import run
from grpo_ext.policy.loading import PolicyConfig, load_tokenizer, model_init_kwargs, quantization
from grpo_ext.run.isolation import in_workers
from grpo_ext.run.quiet import quiet_libraries
from rewards import check_gold, math_answer_reward

EMBEDDED = f"{HERE}/tiny_math.yaml"  # the settings of the run without arguments


@dataclass
class MathArguments(ScriptArguments):
    """What a math run adds to TRL's script arguments (`dataset_name`, `dataset_config`, splits)."""

    max_eval_prompts: int = field(
        default=256, metadata={"help": "Held-out problems to evaluate on, at most; 256 give an interval of +-0.06."}
    )
    eval_samples: int = field(
        default=0,
        metadata={
            "help": "Answers sampled per held-out problem before and after training, for pass@k; 0: greedy only."
        },
    )


def parse(argv: list[str]) -> tuple[MathArguments, GRPOExtConfig, PolicyConfig]:
    """The flags of this run; the embedded model and problems where neither a model, data nor a config file is named."""
    parser = TrlParser((MathArguments, GRPOExtConfig, PolicyConfig))
    parser.set_defaults(output_dir="outputs/math", logging_steps=1, eval_steps=50, max_steps=500)
    if not {"--model_name_or_path", "--dataset_name", "--config"} & {flag.partition("=")[0] for flag in argv}:
        argv = ["--config", EMBEDDED, *argv]
    script_args, args, model_args = parser.parse_args_and_config(argv)
    if not (model_args.model_name_or_path and script_args.dataset_name):
        parser.error("give both --model_name_or_path and --dataset_name, or neither for the embedded run")
    for owner, name in ((model_args, "model_name_or_path"), (script_args, "dataset_name")):
        setattr(owner, name, getattr(owner, name).replace("$RECIPES", HERE))
    return script_args, args, model_args


def main(argv: list[str]) -> None:
    os.environ["PYTHONSAFEPATH"] = "1"  # no child process puts this folder on its path either
    quiet_libraries()
    script_args, args, model_args = parse(argv)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = load_problems(
        script_args.dataset_name,
        tokenizer,
        config=script_args.dataset_config,
        train_split=script_args.dataset_train_split,
        test_split=script_args.dataset_test_split,
        max_heldout=script_args.max_eval_prompts,
        seed=args.seed,
    )
    for rows in (problems.train, problems.heldout):
        check_gold(rows["answer"])
    reward = in_workers(math_answer_reward, args.reward_workers, args.reward_timeout)
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    trainer = GRPOExtTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward,
        args=args,
        train_dataset=problems.train,
        processing_class=tokenizer,
        quantization_config=quantization(model_args, args),
        peft_config=get_peft_config(model_args),
    )
    run(trainer, problems, reward, recipe="math", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
