"""The adapter that did best on the held-out problems, kept in `output_dir/best` beside the last one.

best/adapter_model.safetensors, best/adapter_config.json, best/best.json: {"step": 150, "pass@1": 0.62}
"""

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

METRIC = "heldout/pass@1"
FOLDER, RECORD = "best", "best.json"
NOT_KEPT = ("ref", "training_args.bin")  # a reference adapter, and a pickle


class BestAdapter(TrainerCallback):
    """Saves the adapter where the held-out accuracy in the log is above all before it, the starting policy's too."""

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self._folder = Path(trainer.args.output_dir, FOLDER)
        self._best = float("-inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what a resumed run had kept by then; anything later, or of another run, is removed."""
        kept = read_best(args.output_dir)
        if kept and state.global_step and kept["step"] <= state.global_step:
            self._best = kept["pass@1"]
        elif kept and self._trainer.accelerator.is_main_process:
            shutil.rmtree(self._folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the adapter where it is the best so far."""
        accuracy = (logs or {}).get(METRIC)
        if accuracy is None or accuracy <= self._best:
            return
        self._best = accuracy
        if state.global_step == 0 or not isinstance(
            self._trainer.accelerator.unwrap_model(self._trainer.model), PeftModel
        ):
            return
        self._trainer.save_model(str(self._folder), _internal_call=True)
        if self._trainer.accelerator.is_main_process:
            for name in NOT_KEPT:
                path = self._folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            (self._folder / RECORD).write_text(json.dumps({"step": state.global_step, "pass@1": accuracy}) + "\n")


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """Step and accuracy of the best adapter of a run; None where there is none."""
    path = Path(output_dir, FOLDER, RECORD)
    return json.loads(path.read_text()) if path.exists() else None
