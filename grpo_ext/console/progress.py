"""A progress bar that shows reward and held-out accuracy instead of the loss."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Logged metric -> its label on the bar. `recipe.train_and_report` logs the held-out pass@1.
BAR_LABELS = {"reward": "reward", "frac_dead_groups": "dead", "kl": "kl", "heldout/pass@1": "pass@1"}


class RewardProgress(ProgressCallback):
    """transformers' bar, followed by the latest reward and accuracy; it prints no dictionary per step."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest reward and accuracy after the bar."""
        if self.training_bar is None or not logs:
            return
        self._latest |= {label: f"{logs[name]:.3g}" for name, label in BAR_LABELS.items() if logs.get(name) is not None}
        self.training_bar.set_postfix(self._latest)
