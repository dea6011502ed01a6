"""Choose which rewards run in worker processes.

    reward_funcs = in_workers(reward_funcs, workers=None, timeout_s=10, seed=42)     # as the trainer does

A plain function stays in the training process, where it is called as TRL calls it.
"""

import weakref
from typing import Any

from torch import nn
from trl.trainer.utils import is_async_callable

from grpo_ext.rewards.workers.pool import IsolatedReward, declares, isolated
from grpo_ext.rewards.workers.processes import WorkerPool, close_pools, start_pools


def in_workers(reward_funcs: Any, workers: int | None, timeout_s: float, seed: int = 0) -> Any:
    """TRL's `reward_funcs`, with some of them wrapped to run in worker processes.

    - A function with the attribute `scores_independently = True`, such as our math and logic rewards, is called with
      one completion at a time, in workers that all such rewards share: a failure costs one completion.
    - Any other function is returned unchanged if `workers` is None. With `workers` of 1 or more, it runs in a worker of
      its own, with whole calls, and keeps its state there.
    - Reward models, asynchronous functions, results of `isolated`, and functions with `runs_in_process = True` (our
      program rewards have a sandbox of their own, our text-shape rewards are fast) are always returned unchanged.

    Args:
        workers: `reward_workers` of the config: the number of processes for rewards with `scores_independently`. None
            for one per core of this training process, up to 4. 0 leaves every reward in the training process.
        timeout_s: seconds per completion.
        seed: seed of the run, from which the random numbers of the workers are derived.
    """
    if isinstance(reward_funcs, list):
        wrapped = [in_workers(reward, workers, timeout_s, seed) for reward in reward_funcs]
        is_changed = any(new is not old for new, old in zip(wrapped, reward_funcs, strict=True))
        return wrapped if is_changed else reward_funcs
    if isinstance(reward_funcs, IsolatedReward):
        if reward_funcs.seed is None:
            reward_funcs.seed = seed
        return reward_funcs
    if workers == 0 or not callable(reward_funcs) or isinstance(reward_funcs, nn.Module):
        return reward_funcs
    if declares(reward_funcs, "runs_in_process") or is_async_callable(reward_funcs):
        return reward_funcs
    if declares(reward_funcs, "scores_independently"):
        return isolated(reward_funcs, timeout_s=timeout_s, workers=workers, batched=False, seed=seed)
    if workers is None:
        return reward_funcs
    return isolated(reward_funcs, timeout_s=timeout_s, batched=True, seed=seed)


def start_workers(reward_funcs: list[Any]) -> None:
    """Start the workers of these rewards in parallel, without waiting for them."""
    start_pools(_pools_of(reward_funcs))


def close_workers(reward_funcs: list[Any]) -> None:
    """End the workers of these rewards; a later call of a reward starts new ones."""
    close_pools(_pools_of(reward_funcs))


def close_with(owner: object, reward_funcs: list[Any]) -> None:
    """End the workers of these rewards when `owner` is garbage-collected."""
    weakref.finalize(owner, close_pools, _pools_of(reward_funcs)).atexit = False


def _pools_of(reward_funcs: list[Any]) -> list[WorkerPool]:
    return [reward.pool for reward in reward_funcs if isinstance(reward, IsolatedReward)]
