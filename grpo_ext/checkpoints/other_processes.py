"""Resume a run on another number of processes: on one GPU instead of two, or the other way round.

It is possible between two rollouts, if a rollout and an update have the same number of completions as before. The
prompts, the optimizer, the schedules and the logs then go on as in the earlier session; completions are sampled with
other random numbers, since each process has its own generator.

    layout(run_facts)       Layout(processes=2, rollout=16, update=16)
"""

from dataclasses import dataclass
from typing import Any

PROCESSES = "number of processes"
# Facts that may differ with the number of processes: `Layout` has what must agree.
SHARES = (PROCESSES, "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


@dataclass(frozen=True)
class Layout:
    """How the completions of a run are distributed.

    Attributes:
        processes: number of processes.
        rollout: completions per rollout, in all processes.
        update: completions per optimizer step, in all processes.
    """

    processes: int
    rollout: int
    update: int


def layout(facts: dict[str, Any]) -> Layout:
    """The layout of the run with this fingerprint."""
    processes, accumulation = facts[PROCESSES], facts["gradient_accumulation_steps"]
    update = facts["per_device_train_batch_size"] * accumulation * processes
    return Layout(processes=processes, rollout=facts["generation_batch_size"], update=update)


def why_impossible(saved: dict[str, Any], now: dict[str, Any], *, in_a_rollout: bool, is_sharded: bool) -> str | None:
    """Why a run cannot continue on another number of processes, and what to do; None if it can.

    Args:
        saved: the fingerprint in the checkpoint.
        now: the fingerprint of this run.
        in_a_rollout: whether the checkpoint is in the middle of a rollout.
        is_sharded: whether the optimizer state is sharded.
    """
    was, is_now = layout(saved), layout(now)
    if (was.rollout, was.update) != (is_now.rollout, is_now.update):
        rows, remainder = divmod(was.update, is_now.processes)
        if remainder:
            return f"its updates have {was.update} completions, which {is_now.processes} processes cannot share equally"
        return (
            f"this run has {is_now.rollout} completions per rollout and {is_now.update} per update, the checkpoint "
            f"{was.rollout} and {was.update}. Choose per_device_train_batch_size and gradient_accumulation_steps such "
            f"that their product is {rows}, and leave steps_per_generation out or scale it alike"
        )
    if in_a_rollout:
        return "it is in the middle of a rollout, whose rows belong to its processes. Use one between two rollouts"
    if is_sharded:
        return "its optimizer state is sharded"
    if now["replay_fraction"] > 0 or now["temperature_schedule"] == "entropy":
        return (
            "each process has its own state for replay_fraction and temperature_schedule='entropy', and the run uses "
            "one of them"
        )
    return None
