"""What recipes share beside the run itself (`experiment.py`): their flags, and problems and a trainer made from them.

Every field of GRPOExtConfig, of TRL's ModelConfig and of the recipe's own arguments is a flag, or a line of a YAML file
that `--config` names; flags win. `$RECIPES` in a model or data set is the folder of the recipes, and
`--num_generations auto` is decided before the run (`memory/auto_group_size.py`).
"""

import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, TrlParser, get_peft_config

from grpo_ext.config import GRPOExtConfig
from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.data import USUAL_WORDING, Problems, Wording, load_problems
from grpo_ext.memory.auto_group_size import parse_flags, with_group_size
from grpo_ext.model.load import PolicyConfig, model_init_kwargs, quantization
from grpo_ext.trainer import GRPOExtTrainer


@dataclass
class RecipeArguments(ScriptArguments):
    """What every recipe adds to TRL's script arguments (`dataset_name`, `dataset_config`, splits)."""

    max_eval_prompts: int = field(
        default=256, metadata={"help": "Held-out problems to evaluate on, at most; 256 give an interval of +-0.06."}
    )
    eval_samples: int = field(
        default=0,
        metadata={
            "help": "Answers sampled per held-out problem before and after training, for pass@k; 0: greedy only."
        },
    )


Arguments = TypeVar("Arguments", bound=RecipeArguments)


def begin() -> None:
    """Quiet libraries, and no child process that puts the folder of the recipes on its path."""
    os.environ["PYTHONSAFEPATH"] = "1"
    quiet_libraries()


def parse(
    argv: list[str], recipe: str, folder: str, *, embedded: str, arguments: type[Arguments]
) -> tuple[Arguments, GRPOExtConfig, PolicyConfig]:
    """The flags of a run; the embedded model and its problems where neither a model, data nor a config file is named.

    Args:
        recipe: its name.
        folder: of the recipes.
        embedded: the YAML file of the run without arguments, in that folder.
        arguments: what the recipe adds to the flags.
    """
    parser = TrlParser((arguments, GRPOExtConfig, PolicyConfig))
    parser.set_defaults(output_dir=f"outputs/{recipe}", logging_steps=1, eval_steps=50, max_steps=500)
    if not {"--model_name_or_path", "--dataset_name", "--config"} & {flag.partition("=")[0] for flag in argv}:
        argv = ["--config", f"{folder}/{embedded}", *argv]
    settings = parse_flags(parser, argv)
    if not (settings.model_name_or_path and settings.dataset_name):
        parser.error("give both --model_name_or_path and --dataset_name, or neither for the embedded run")
    script_args, args, model_args = parser.parse_args_and_config(with_group_size(argv, settings, folder=folder))
    for owner, name in ((model_args, "model_name_or_path"), (script_args, "dataset_name")):
        setattr(owner, name, getattr(owner, name).replace("$RECIPES", folder))
    return script_args, args, model_args


def find_problems(
    script_args: RecipeArguments,
    args: GRPOExtConfig,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording = USUAL_WORDING,
) -> Problems:
    """The problems that these flags name, put as `wording` says.

    Raises:
        SystemExit, ValueError: as `data.load_problems`.
    """
    return load_problems(
        script_args.dataset_name,
        tokenizer,
        config=script_args.dataset_config,
        train_split=script_args.dataset_train_split,
        test_split=script_args.dataset_test_split,
        max_heldout=script_args.max_eval_prompts,
        seed=args.seed,
        wording=wording,
    )


def build_trainer(
    reward: Any,
    problems: Problems,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOExtConfig,
    model_args: PolicyConfig,
    **arguments: Any,
) -> GRPOExtTrainer:
    """The trainer of these flags; `arguments` are further ones of its own."""
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    return GRPOExtTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward,
        args=args,
        train_dataset=problems.train,
        processing_class=tokenizer,
        quantization_config=quantization(model_args, args),
        peft_config=get_peft_config(model_args),
        **arguments,
    )
