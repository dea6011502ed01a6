"""Describe a run in plain words: the lines of the banner, some of which are also in the model card.

{"model": "Qwen/Qwen2.5-0.5B, 494.03M parameters in bfloat16", "one step": "64 completions (8 prompts x 8), ...", ...}
"""

from trl import GRPOTrainer

from grpo_ext.machine import device_name, memory_in_use
from grpo_ext.model.adapters import count_parameters


def describe_run(trainer: GRPOTrainer, *, model_name: str, data: str) -> dict[str, str]:
    """The description, label -> text.

    Args:
        trainer: does not need to be trained yet.
        model_name: the name shown to the user.
        data: the text for the label "data".
    """
    args = trainer.args
    is_adapter = hasattr(trainer.model, "peft_config")
    trainable, total = count_parameters(trainer.model)
    frozen = total - trainable if is_adapter else total
    rows = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    groups = rows / args.num_generations
    micro = args.per_device_train_batch_size
    whole = (
        "whole groups"
        if micro % args.num_generations == 0
        else f"not whole groups; a multiple of {args.num_generations} is faster"
    )
    dtype = str(next(p.dtype for p in trainer.model.parameters() if not p.requires_grad or trainable == total))
    if args.beta == 0:
        reference = "none (beta = 0)"
    elif is_adapter:
        reference = f"the same backbone with the adapter off (no second model); beta = {args.beta:g}"
    else:
        reference = f"a frozen second copy of the model (no adapter); beta = {args.beta:g}"
    return {
        "model": f"{model_name}, {frozen / 1e6:.2f}M parameters in {dtype.removeprefix('torch.')}",
        "device": device_name(trainer.accelerator.device)
        + (f", {args.world_size} processes" if args.world_size > 1 else ""),
        "trains": f"{trainable:,} parameters ({100 * trainable / total:.2f}%)"
        + (", the adapter, in float32" if is_adapter else ", the whole model"),
        "reference": reference,
        "one step": f"{rows} completions ({groups:g} prompt{'s' * (groups != 1)} x {args.num_generations}) of up to "
        f"{args.max_completion_length} tokens, in micro-batches of {micro} ({whole})",
        "steps": f"{planned_steps(trainer)}, learning rate {args.learning_rate:g}, {args.loss_type}, seed {args.seed}",
        "data": data,
        "memory": memory_in_use(trainer.accelerator.device),
        "note": "The loss does not measure progress in GRPO: it stays near 0. Watch the reward and the held-out "
        "accuracy.",
    }


def planned_steps(trainer: GRPOTrainer) -> int:
    """Optimizer steps of the run: `max_steps`, else epochs x prompts x G x iterations / completions per step."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    prompts_per_rollout = args.generation_batch_size // args.num_generations
    rollouts = len(trainer.train_dataset) // prompts_per_rollout  # TRL drops the last incomplete one
    micro_batches = rollouts * args.steps_per_generation * args.num_iterations
    return int(args.num_train_epochs * (micro_batches // args.gradient_accumulation_steps))
