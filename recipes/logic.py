"""Teach a model to solve puzzles: GRPO with LoRA on the tasks of reasoning-gym, made offline.

    accelerate launch recipes/logic.py

Without arguments: the embedded 0.87M-parameter model on the sums of reasoning-gym's basic_arithmetic, offline, on two
CPU cores. Held-out pass@1: greedy 0.09 -> 0.82 (n=256, seed 0), forty seconds of training. Needs
`pip install "grpo-ext[logic]"`, and that a C compiler.

    accelerate launch recipes/logic.py --config recipes/knights_knaves.yaml

One GPU of 8 GB or more; planned, and not measured yet, so there is no number to expect.

`--dataset_name` is a task of reasoning-gym; those that rewards/logic.py refuses are named there. Every field of
GRPOExtConfig, of TRL's ModelConfig and of LogicArguments below is a flag, or a line of a YAML file that `--config`
names; flags win.
"""

import sys

# Started as a script, this folder comes first on sys.path, where `import math` would find the recipe of that name.
HERE = __file__.replace("\\", "/").rpartition("/")[0]
sys.path[:] = [entry for entry in sys.path if entry.replace("\\", "/").rstrip("/") != HERE]

import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from grpo_ext.data import PLAIN_PROMPT, Problems, Wording, with_prompts
from grpo_ext.experiment import run
from grpo_ext.model.load import load_tokenizer
from grpo_ext.recipe import RecipeArguments, begin, build_trainer, parse
from grpo_ext.rollout.reward_workers import in_workers
from rewards.logic import logic_problems, logic_reward

SYSTEM_LINE = "Reason step by step, and put the final answer between <answer> and </answer>."


@dataclass
class LogicArguments(RecipeArguments):
    """What a run on puzzles adds."""

    task_options: str = field(
        default="{}", metadata={"help": 'Options of the task as JSON, for example {"min_terms": 3}.'}
    )
    train_problems: int = field(default=2000, metadata={"help": "Puzzles to train on."})
    plain_prompt: str = field(
        default=PLAIN_PROMPT,
        metadata={
            "help": "What a base model reads, with {question} or any field of the puzzle's metadata in braces, such as "
            "{expression}; {expression:tight} leaves its spaces out."
        },
    )


class Field(str):
    """A text whose format `tight` leaves its spaces out."""

    def __format__(self, form: str) -> str:
        return self.replace(" ", "") if form == "tight" else super().__format__(form)


def main(argv: list[str]) -> None:
    begin()
    script_args, args, model_args = parse(argv, "logic", HERE, embedded="tiny_logic.yaml", arguments=LogicArguments)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    task, options = script_args.dataset_name, json.loads(script_args.task_options)
    sizes = {"train": script_args.train_problems, "heldout": script_args.max_eval_prompts}
    train, heldout = (Dataset.from_list(rows) for rows in logic_problems(task, **sizes, seed=args.seed, **options))

    def asked(question: str, row: dict[str, Any]) -> str:
        """A base model gets the puzzle as `plain_prompt` words it, a chat model as reasoning-gym does."""
        if tokenizer.chat_template is not None:
            return question
        fields = json.loads(row["metadata"])["metadata"] | {"question": question}
        return script_args.plain_prompt.format(**{name: Field(value) for name, value in fields.items()})

    wording = Wording(system=SYSTEM_LINE, plain="{question}", question=asked)
    problems = Problems(
        train=with_prompts(train, tokenizer, task, wording),
        heldout=with_prompts(heldout, tokenizer, task, wording),
        note=f"{len(heldout)} puzzles of {task}",
    )
    reward = in_workers(logic_reward, args.reward_workers, args.reward_timeout)
    trainer = build_trainer(reward, problems, tokenizer, args, model_args)
    run(trainer, problems, reward, recipe="logic", eval_samples=script_args.eval_samples)


if __name__ == "__main__":
    main(sys.argv[1:])
