"""A progress bar that shows what counts: reward and held-out accuracy, not the loss."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Metric of the log -> its label on the bar. pass@1 is logged by `report.heldout.HeldOutAccuracy`.
SHOWN = {"reward": "reward", "frac_dead_groups": "dead", "kl": "kl", "heldout/pass@1": "pass@1"}


class RewardProgress(ProgressCallback):
    """transformers' bar, with the latest reward and accuracy behind it in place of a printed dictionary a step."""

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
        """Put the latest reward and accuracy behind the bar."""
        if self.training_bar is None or not logs:
            return
        self._latest |= {label: f"{logs[name]:.3g}" for name, label in SHOWN.items() if logs.get(name) is not None}
        self.training_bar.set_postfix(self._latest)
