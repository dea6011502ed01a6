"""The progress display of a run: a bar with reward and held-out accuracy instead of the loss, or one line per log.

There is only one display: a display of the user's replaces it, and a notebook keeps the table of transformers.
"""

from collections.abc import Sequence
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import has_length
from trl import RichProgressCallback

from grpo_ext.console.terminal import bar, show

# Logged metric -> its label on the bar. `recipe.train_and_report` logs the held-out pass@1.
BAR_LABELS = {"reward": "reward", "frac_dead_groups": "dead", "kl": "kl", "heldout/pass@1": "pass@1"}


class RewardProgress(ProgressCallback):
    """transformers' bar, followed by the latest reward and accuracy. It prints no dictionary per step, and an
    evaluation leaves no bar behind."""

    prediction_bar: Any  # None except during an evaluation

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self.training_bar = bar(total=state.max_steps, leave=True)
        self.current_step = 0

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Show a second bar during an evaluation."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = bar(total=len(eval_dataloader))
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

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


class LogLines(PrinterCallback):
    """transformers' line per log, for `disable_tqdm=True`; a stream that rejects it does not end the run."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the log."""
        shown = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
        if state.is_local_process_zero:
            show(str({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in shown.items()}))


def show_one_progress(trainer: Trainer, given: Sequence[TrainerCallback | type[TrainerCallback]] | None) -> None:
    """Replace the display that transformers has added, unless it is the table of a notebook.

    Args:
        given: the callbacks of the user. If one of them is a progress display, it becomes the only one.
    """
    if trainer.args.disable_tqdm:
        default: type[TrainerCallback] = PrinterCallback
        displays: tuple[type[TrainerCallback], ...] = (PrinterCallback,)
    else:
        default = transformers_trainer.DEFAULT_PROGRESS_CALLBACK  # the table of a notebook, or `ProgressCallback`
        displays = (ProgressCallback, RichProgressCallback, default)
    kinds = [callback if isinstance(callback, type) else type(callback) for callback in given or ()]
    has_own = any(issubclass(kind, displays) for kind in kinds)
    if not has_own and default not in (PrinterCallback, ProgressCallback):
        return  # a notebook
    added = [callback for callback in trainer.callback_handler.callbacks if type(callback) is default]
    if added:
        trainer.remove_callback(added[-1])  # transformers adds its own display after the user's callbacks
    if not has_own:
        trainer.add_callback(LogLines() if default is PrinterCallback else RewardProgress())
