"""The checks before the first step, so that a run fails in its first minute or not at all.

`before_weights` checks settings, data, tokenizer and rewards before any weights are loaded. `try_rewards` calls the
rewards that can be tried. `before_training` checks the built trainer and runs the worst-case step. A setting that
cannot work raises an error with the value received, a valid one, and what to type. A merely unwise one gives a warning.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from grpo_ext.checks import prompts as check_prompts
from grpo_ext.checks import rewards as check_rewards
from grpo_ext.checks.worst_case_step import WorstCase, run_worst_case_step, why_not_run
from grpo_ext.console.terminal import show
from grpo_ext.machine import GIB
from grpo_ext.model.adapters import trainable_parameters
from grpo_ext.model.chat import text_tokenizer, tokenize_prompt

logger = get_logger(__name__)

KEPT_COLUMNS = ("prompt", "image", "images")  # columns that TRL keeps with remove_unused_columns=True
SHOWN_CHARACTERS = 600
SLOW_LORA = 5e-6  # learning rates below this are for full fine-tuning
FEW_GENERATIONS = 4
FEW_PROMPTS = 4  # per update
LONG_COMPLETION = 50  # tokens; rounding in 16 bits may push the ratio of a longer completion out of its clip range


def before_weights(given: dict[str, Any]) -> Any:
    """Check everything that can be checked before a model is loaded.

    Args:
        given: the arguments of TRL's trainer, by name.

    Returns:
        The training data, without overlong prompts if `overlong_prompts="drop"`.

    Raises:
        ValueError: a setting, the data or a reward cannot work.
    """
    model, args, reward_funcs = given["model"], given["args"], given["reward_funcs"]
    data, peft_config = given.get("train_dataset"), given.get("peft_config")
    is_quantized = given.get("quantization_config") is not None or getattr(model, "is_quantized", False)
    warnings = _check_settings(model, args, peft_config, is_quantized=is_quantized)
    if isinstance(data, Dataset):
        check_prompts.check_count(len(data), args.generation_batch_size, args.num_generations)
        if given.get("rollout_func") is None and given.get("environment_factory") is None:
            rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            columns = check_prompts.columns_of(data)
            check_prompts.check_has_prompts(columns)
            check_rewards.check_signatures(rewards, _passed_on(args, columns))
            warnings += check_rewards.check_golds(rewards, data)
            data, left_out = _check_prompts(model, args, data, given.get("processing_class"))
            warnings += left_out
    for warning in warnings:
        logger.warning(warning)
    return data


def _check_settings(
    model: str | nn.Module, args: GRPOConfig, peft_config: PeftConfig | None, *, is_quantized: bool
) -> list[str]:
    has_adapter = peft_config is not None or isinstance(model, PeftModel)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would copy the model to each of them in every step "
            f"(DataParallel). Start one process per GPU with `accelerate launch --num_processes {args.n_gpu}`, or make "
            f"only one GPU visible: CUDA_VISIBLE_DEVICES=0."
        )
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16=True needs a GPU, and this run is on the CPU. Leave fp16 out, or set use_cpu=False.")
    if is_quantized and not has_adapter:
        raise ValueError(
            "A model in 4 or 8 bits cannot be trained itself. Give a peft_config to train an adapter on top of it, or "
            "load it without quantization."
        )
    warnings, group = [], args.num_generations
    if group < FEW_GENERATIONS:
        odds = ", ".join(f"{p**group + (1 - p) ** group:.0%} at {p}" for p in (0.5, 0.8))
        warnings.append(
            f"num_generations={group}: a group whose completions are all right or all wrong teaches nothing. Expected "
            f"share of such groups, by the model's accuracy: {odds}. Use 8 if memory allows."
        )
    rows = args.per_device_train_batch_size * args.world_size
    prompts = rows * args.gradient_accumulation_steps / group
    if prompts < FEW_PROMPTS:
        warnings.append(
            f"An update has the completions of {prompts:g} prompt{'' if prompts == 1 else 's'}, so it follows single "
            f"problems. Use 8 or more prompts: gradient_accumulation_steps={-(-8 * group // rows)}."
        )
    if has_adapter and args.learning_rate < SLOW_LORA:
        warnings.append(
            f"learning_rate={args.learning_rate:g} is typical of full fine-tuning and hardly moves an adapter. Use "
            f"1e-5 to 1e-4."
        )
    if _is_sequence_ratio_noisy(args):
        warnings.append(
            f"loss_type='grpo_sequence' has one ratio per completion, the product of the ratios of its tokens. In this "
            f"run, old and new log-probs come from different forwards. In 16 bits, their rounding errors add up over "
            f"up to max_completion_length={args.max_completion_length} tokens and may exceed epsilon="
            f"{args.epsilon:g}. Use one update per rollout (num_iterations=1, gradient_accumulation_steps a multiple "
            f"of steps_per_generation={args.steps_per_generation}, use_vllm=False), a loss with one ratio per token "
            f"(loss_type='dapo'), or float32 (bf16=False, fp16=False)."
        )
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout and not args.disable_dropout:
        warnings.append(
            f"lora_dropout={dropout} is on in sampling and in scoring, so each of them sees a different policy. Use "
            f"disable_dropout=True, or lora_dropout=0."
        )
    return warnings


def _is_sequence_ratio_noisy(args: GRPOConfig) -> bool:
    serves_several_steps = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
    is_off_policy = args.use_vllm or serves_several_steps
    is_16_bit = args.bf16 or args.fp16
    is_long = args.max_completion_length is None or args.max_completion_length > LONG_COMPLETION
    return args.loss_type == "grpo_sequence" and is_off_policy and is_16_bit and is_long


def _check_prompts(
    model: str | nn.Module, args: GRPOConfig, data: Dataset, tokenizer: Any
) -> tuple[Dataset, list[str]]:
    """The data without the prompts to be left out, and a warning with their number if there are any."""
    options = {"trust_remote_code": args.trust_remote_code}
    if isinstance(model, str):
        options["revision"] = (args.model_init_kwargs or {}).get("revision") or "main"
        config = AutoConfig.from_pretrained(model, **options)
    else:
        config = model.config
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(get_config_model_id(config), **options)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return data, []  # a processor, for example of images
    template, warnings = args.chat_template_kwargs or {}, []
    if args.max_prompt_tokens is not None:
        limits = args.max_prompt_tokens, args.overlong_prompts
        data, left_out = check_prompts.without_overlong(data, tokenizer, template, *limits)
        if left_out is not None:
            warnings.append(left_out)
            check_prompts.check_count(len(data), args.generation_batch_size, args.num_generations)
    _, longest = check_prompts.find_longest(data, tokenizer, template)
    check_prompts.check_tokens(longest, tokenizer, config, args.max_completion_length)
    return data, warnings


def _passed_on(args: GRPOConfig, columns: Sequence[str]) -> list[str]:
    """The columns that TRL keeps."""
    return [name for name in columns if not args.remove_unused_columns or name in KEPT_COLUMNS]


def try_rewards(trainer: GRPOTrainer, state: TrainerState) -> dict[str, list[float | None]]:
    """Call each reward that can be tried as TRL would: with a whole group of completions of the first prompt.

    Args:
        state: state of the run.

    Returns:
        Name of the reward -> its scores; empty if the rewards need data that only a rollout has.

    Raises:
        ValueError: a reward fails.
    """
    data = trainer.train_dataset
    if not isinstance(data, Dataset) or trainer.rollout_func is not None or trainer.environment_factories is not None:
        return {}
    row = data[0]
    return check_rewards.call_once(
        trainer.reward_funcs,
        {name: row[name] for name in _passed_on(trainer.args, list(row))},
        completions=trainer.num_generations,
        completion_ids=text_tokenizer(trainer.processing_class)(check_rewards.EXAMPLE_COMPLETION)["input_ids"],
        state=state,
    )


def before_training(trainer: GRPOTrainer, scores: dict[str, list[float | None]]) -> None:
    """Check the built trainer, run the worst-case step, and print its duration and peak memory. If that step cannot be
    run, the log says why.

    Args:
        scores: the result of `try_rewards`, to be printed; empty if it has not been called.

    Raises:
        ValueError: no parameter is trainable.
        RuntimeError: the worst-case step does not fit into memory.
    """
    if not trainable_parameters(trainer.model):
        raise ValueError(
            "No trainable parameters. If your adapter was loaded frozen, pass is_trainable=True to "
            "PeftModel.from_pretrained; if there is no adapter, give peft_config."
        )
    data, template = trainer.train_dataset, trainer.chat_template_kwargs
    tokenizer = text_tokenizer(trainer.processing_class)
    reason = why_not_run(trainer)
    if reason is not None:
        logger.warning(f"No worst-case step is run before training: {reason}.")
        return
    row, longest = check_prompts.find_longest(data, tokenizer, template)
    ends = set(trainer.eos_token_ids)
    for warning in check_prompts.warnings_of_template(tokenizer, data[0]["prompt"], template, ends):
        logger.warning(warning)
    worst = run_worst_case_step(trainer, data[row], longest, tokenize_prompt(tokenizer, data[0]["prompt"], **template))
    if trainer.accelerator.is_main_process and not trainer.args.disable_tqdm:
        _show(worst, scores, is_on_gpu=trainer.accelerator.device.type == "cuda")


def _show(worst: WorstCase, scores: dict[str, list[float | None]], *, is_on_gpu: bool) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    peak = f"{worst.peak_mb * 1e6 / GIB:.2f} GB {'allocated by PyTorch' if is_on_gpu else 'resident'}"
    table.add_row("worst-case step", f"{worst.seconds:.1f} s, peak memory {peak}")
    if worst.chunks is not None:
        table.add_row("update", worst.chunks)
    if scores:
        shown = ", ".join(f"{name}: {v if v is None else round(v, 3)}" for name, (v, *_) in scores.items())
        table.add_row("rewards", f"{shown} (for a completion without an answer)")
    table.add_row("first prompt", Text(worst.prompt[-SHOWN_CHARACTERS:]))
    table.add_row("a completion", Text(worst.completion[:SHOWN_CHARACTERS]))
    show(Panel(table, title="Before the first step", title_align="left", expand=False))
