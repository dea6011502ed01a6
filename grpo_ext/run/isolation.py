"""Which rewards run in worker processes, where one answer can neither hang nor end a run."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewards.pool import IsolatedReward, isolated


def in_workers(reward_funcs: Any, workers: int | None, timeout_s: float) -> Any:
    """TRL's `reward_funcs`, of which those that say `judges_alone = True` are in worker processes.

    Only those: a reward that compares answers with each other, or that keeps something in the training process, would
    quietly become another one.

    Args:
        workers: processes of each; None for as many as this training process has cores, 0 for none.
        timeout_s: seconds for one answer.
    """
    if isinstance(reward_funcs, list):
        return [in_workers(reward, workers, timeout_s) for reward in reward_funcs]
    if workers == 0 or not getattr(reward_funcs, "judges_alone", False):
        return reward_funcs
    return isolated(reward_funcs, timeout_s=timeout_s, workers=workers)


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
