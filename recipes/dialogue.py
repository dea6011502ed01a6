"""Teach a model to talk: GRPO with LoRA on games of several turns whose outcome can be checked.

    accelerate launch recipes/dialogue.py

Without arguments: the embedded 0.87M-parameter model and a calculator, offline, on two CPU cores.
"""

import sys

# Started as a script, this folder comes first on sys.path, where `import math` would find the recipe of that name.
HERE = __file__.replace("\\", "/").rpartition("/")[0]
sys.path[:] = [entry for entry in sys.path if entry.replace("\\", "/").rstrip("/") != HERE]

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from grpo_ext import GRPOExtConfig
from grpo_ext.data import load_problems
from grpo_ext.experiment import run
from grpo_ext.policy.loading import PolicyConfig, load_tokenizer
from grpo_ext.recipe import RecipeArguments, begin, build_trainer
from grpo_ext.recipe import parse as parse_flags
from grpo_ext.report.dialogues import evaluate_dialogue
from grpo_ext.rollout.dialogue import Dialogue, dialogue_reward
from grpo_ext.rollout.games import Calculator, GuessNumber

GAMES = {"calculator": Calculator, "guess_number": GuessNumber}


@dataclass
class DialogueArguments(RecipeArguments):
    """What a run of games adds."""

    game: Literal["calculator", "guess_number"] = field(default="calculator", metadata={"help": "What is played."})
    max_turns: int = field(default=8, metadata={"help": "Turns of the model in a game."})
    max_turn_tokens: int | None = field(default=None, metadata={"help": "Tokens of one turn; by default as the game."})


def parse(argv: list[str]) -> tuple[DialogueArguments, GRPOExtConfig, PolicyConfig]:
    return parse_flags(argv, "dialogue", HERE, embedded="tiny_dialogue.yaml", arguments=DialogueArguments)


def main(argv: list[str]) -> None:
    begin()
    script_args, args, model_args = parse(argv)
    tokenizer = load_tokenizer(model_args, trust_remote_code=args.trust_remote_code)
    problems = load_problems(script_args.dataset_name, tokenizer, max_heldout=script_args.max_eval_prompts, seed=args.seed)
    dialogue = Dialogue(
        GAMES[script_args.game], max_turns=script_args.max_turns, max_turn_tokens=script_args.max_turn_tokens
    )
    trainer = build_trainer(dialogue_reward, problems, tokenizer, args, model_args, rollout_func=dialogue)
    stop_strings = (args.generation_kwargs or {}).get("stop_strings", [])
    evaluate = partial(evaluate_dialogue, stop_strings=stop_strings)
    run(trainer, problems, dialogue, recipe="dialogue", eval_samples=script_args.eval_samples, evaluate=evaluate)


if __name__ == "__main__":
    main(sys.argv[1:])
