"""Which rewards run in worker processes, where no answer can hang or end a run."""

from typing import Any

import cloudpickle
from accelerate.logging import get_logger
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import is_async_callable

from rewards.workers.pool import IsolatedReward, callable_name, isolated

logger = get_logger(__name__)

# A reward that carries more than this, a model for example, would be held twice.
LARGEST_REWARD_MB = 16


def in_workers(reward_funcs: Any, workers: int | None, timeout_s: float) -> Any:
    """TRL's `reward_funcs` in worker processes, with what each of them may count on kept as it is.

    - One with an attribute `scores_independently = True` (ours that parse mathematics have it) is given one answer at a
      time, in several workers: a failure costs one answer.
    - Any other function is given whole calls, as TRL gives them, in one worker, where it may compare answers and
      remember earlier ones: a failure costs the answers of the call, and usually stops the run, with a message.
    - Reward models, asynchronous functions, and those with `runs_in_process = True` (programs have a sandbox of their
      own, the shape of a text is judged at once) are left alone. So is what cannot be sent to a worker; the log says
      why.

    Args:
        workers: processes of each reward that scores independently; None for as many as this training process has
            cores, 0 to leave every reward in the training process.
        timeout_s: seconds for one answer.
    """
    if isinstance(reward_funcs, list):
        return [in_workers(reward, workers, timeout_s) for reward in reward_funcs]
    if workers == 0 or not callable(reward_funcs) or isinstance(reward_funcs, nn.Module):
        return reward_funcs
    if getattr(reward_funcs, "runs_in_process", False) or is_async_callable(reward_funcs):
        return reward_funcs
    if getattr(reward_funcs, "scores_independently", False):
        return isolated(reward_funcs, timeout_s=timeout_s, workers=workers)
    if reason := _stays(reward_funcs):
        logger.warning(f"A reward runs in the training process, where a hang or a crash of it ends the run: {reason}.")
        return reward_funcs
    return isolated(reward_funcs, timeout_s=timeout_s, batched=True)


def _stays(reward: Any) -> str | None:
    """Why this reward cannot be sent to a worker; None where it can."""
    name = callable_name(reward)
    try:
        megabytes = len(cloudpickle.dumps(reward)) / 2**20
    except Exception as error:  # whatever an object raises that cannot be pickled
        return f"{name!r} holds what cannot be sent to a worker ({error!r})"
    if megabytes > LARGEST_REWARD_MB:
        return f"{name!r} carries {megabytes:.0f} MB, and at most {LARGEST_REWARD_MB} are sent to a worker"
    return None


class WorkersEnd(TrainerCallback):
    """Ends the workers of these rewards with the training; a later call starts new ones."""

    def __init__(self, reward_funcs: list[Any]):
        self._rewards = [reward for reward in reward_funcs if isinstance(reward, IsolatedReward)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close them."""
        for reward in self._rewards:
            reward.close()
