"""Move rewards into worker processes, so that a completion that hangs or crashes a reward cannot end the run.

reward_funcs = in_workers(reward_funcs, workers=None, timeout_s=10)     # as the trainer does
"""

from typing import Any

import cloudpickle
from accelerate.logging import get_logger
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import is_async_callable

from rewards.workers.pool import IsolatedReward, callable_name, isolated

logger = get_logger(__name__)

# Larger rewards, for example one that holds a model, stay in the training process: a worker would need a second copy.
MAX_REWARD_MB = 16


def in_workers(reward_funcs: Any, workers: int | None, timeout_s: float) -> Any:
    """TRL's `reward_funcs`, wrapped to run in worker processes.

    - A function with the attribute `scores_independently = True` (our math rewards have it) is called with one
      completion at a time in several workers: a failure costs one completion.
    - Any other function gets whole calls, as from TRL, in a single worker, so that it may compare completions and
      remember earlier ones. A failure costs all completions of the call, and usually stops the run with a message.
    - Reward models, asynchronous functions, and functions with `runs_in_process = True` (programs run in their own
      sandbox, text shape is scored at once) are returned unchanged. So are functions that cannot be sent to a worker,
      with a warning that gives the reason.

    Args:
        workers: processes per reward with `scores_independently`; None for one per core of this training process, 0 to
            leave every reward in the training process.
        timeout_s: seconds per completion.
    """
    if isinstance(reward_funcs, list):
        return [in_workers(reward, workers, timeout_s) for reward in reward_funcs]
    if workers == 0 or not callable(reward_funcs) or isinstance(reward_funcs, nn.Module):
        return reward_funcs
    if getattr(reward_funcs, "runs_in_process", False) or is_async_callable(reward_funcs):
        return reward_funcs
    if getattr(reward_funcs, "scores_independently", False):
        return isolated(reward_funcs, timeout_s=timeout_s, workers=workers)
    if reason := _why_in_process(reward_funcs):
        logger.warning(f"A reward runs in the training process, where a hang or a crash of it ends the run: {reason}.")
        return reward_funcs
    return isolated(reward_funcs, timeout_s=timeout_s, batched=True)


def _why_in_process(reward: Any) -> str | None:
    """Why this reward cannot be sent to a worker; None if it can."""
    name = callable_name(reward)
    try:
        megabytes = len(cloudpickle.dumps(reward)) / 2**20
    except Exception as error:  # an object may raise anything when it is pickled
        return f"{name!r} holds what cannot be sent to a worker ({error!r})"
    if megabytes > MAX_REWARD_MB:
        return f"{name!r} carries {megabytes:.0f} MB, and at most {MAX_REWARD_MB} are sent to a worker"
    return None


class CloseWorkers(TrainerCallback):
    """Stops the workers of these rewards when training ends; a later call of a reward starts new ones."""

    def __init__(self, reward_funcs: list[Any]):
        self._rewards = [reward for reward in reward_funcs if isinstance(reward, IsolatedReward)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop the workers."""
        for reward in self._rewards:
            reward.close()
