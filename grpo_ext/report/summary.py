"""Write `summary.json`: the results of a run in one object, for scripts that compare runs.

{"recipe": "math", "steps": 30, "pass_at_1_before": {"value": 0.15, "low": 0.11, "high": 0.2, "n": 256}, ...}
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from grpo_ext.evaluation.complete import Evaluation
from grpo_ext.evaluation.estimates import Difference, Estimate
from grpo_ext.machine import device_name, package_versions, peak_memory_mb
from grpo_ext.model.adapters import count_parameters
from grpo_ext.report.run_files import SUMMARY_FILE


def build_summary(
    trainer: GRPOTrainer,
    *,
    recipe: str,
    base_model: str,
    seconds: float,
    before: Evaluation,
    after: Evaluation,
) -> dict[str, Any]:
    """The contents of `summary.json`.

    Args:
        recipe: name of the recipe.
        base_model: name of the base model.
        seconds: duration of the training in this session, without the evaluations before and after it.
        before, after: evaluations of the starting policy and of the trained one, on the same problems.
    """
    args, state = trainer.args, trainer.state
    trainable, total = count_parameters(trainer.model)
    rollouts = state.global_step * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    completions = round(rollouts * args.generation_batch_size)
    was, now = asdict(before), asdict(after)
    sampled = Difference.of(before.shares, after.shares) if before.shares else None
    return {
        "recipe": recipe,
        "base_model": base_model,
        "device": device_name(trainer.accelerator.device),
        "steps": state.global_step,
        "seconds": round(seconds, 1),
        "prompts_seen": completions // args.num_generations,
        "completions_seen": completions,
        "pass_at_1_before": was["greedy"],
        "pass_at_1_after": now["greedy"],
        "pass_at_1_difference": asdict(Difference.of(before.right, after.right)),
        "sampled_pass_at_1_before": was["sampled"],
        "sampled_pass_at_1_after": now["sampled"],
        "sampled_pass_at_1_difference": sampled and asdict(sampled),
        "lenient_pass_at_1_before": was["lenient"],
        "lenient_pass_at_1_after": now["lenient"],
        "lenient_sampled_pass_at_1_before": was["lenient_sampled"],
        "lenient_sampled_pass_at_1_after": now["lenient_sampled"],
        "pass_at_k_before": was["pass_at_k"],
        "pass_at_k_after": now["pass_at_k"],
        "k": before.k,
        "pass_at_before": was["pass_at"],
        "pass_at_after": now["pass_at"],
        "pass_at_1_by_kind_before": was["kinds"],
        "pass_at_1_by_kind_after": now["kinds"],
        "peak_memory_mb": round(peak_memory_mb(trainer.accelerator.device)),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "versions": {"python": platform.python_version(), **package_versions()},
        "seed": args.seed,
    }


def write_summary(output_dir: str | Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` into the output folder of the run."""
    (Path(output_dir) / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def accuracy_lines(summary: dict[str, Any]) -> str:
    """The last lines of a run, one for greedy and one for sampled completions:

    held-out pass@1: 0.39 [0.33, 0.45] -> 0.93 [0.89, 0.95], +0.54 [+0.47, +0.60], p < 0.001  (greedy, n=256, 46 s)
    """
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    duration = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    lines = []
    for label, name in (("greedy", "pass_at_1"), ("sampled", "sampled_pass_at_1")):
        before, after, change = (summary[f"{name}_{part}"] for part in ("before", "after", "difference"))
        if before and after:
            figures = f"{Estimate(**before)} -> {Estimate(**after)}, {Difference(**change)}"
            lines.append(f"held-out pass@1: {figures}  ({label}, n={before['n']}, {duration})")
    return "\n".join(lines)
