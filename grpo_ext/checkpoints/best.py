"""Keep the adapter with the best held-out accuracy in `output_dir/best`, in addition to the latest one.

best/adapter_model.safetensors, best/adapter_config.json, best/best.json: {"step": 150, "pass@1": 0.62}
"""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

logger = get_logger(__name__)

METRIC = "heldout/pass@1"
FOLDER, RECORD = "best", "best.json"
EXCLUDED = ("ref", "training_args.bin")  # a reference adapter, and a pickle


class BestAdapter(TrainerCallback):
    """Saves the adapter if its logged held-out accuracy exceeds all earlier ones, including the starting policy's."""

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self._folder = Path(trainer.args.output_dir, FOLDER)
        self._best = float("-inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue with the best adapter of a resumed run; delete one from a later step or another run."""
        saved = read_best(args.output_dir)
        if saved and state.global_step and saved["step"] <= state.global_step:
            self._best = saved["pass@1"]
        elif saved and self._trainer.accelerator.is_main_process:
            logger.warning(f"{self._folder} is deleted: its adapter, of step {saved['step']}, is not of this run.")
            shutil.rmtree(self._folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the adapter if it is the best so far."""
        accuracy = (logs or {}).get(METRIC)
        if accuracy is None or accuracy <= self._best:
            return
        self._best = accuracy
        if state.global_step == 0 or not isinstance(
            self._trainer.accelerator.unwrap_model(self._trainer.model), PeftModel
        ):
            return
        new = self._folder.with_name(f"{FOLDER}.new")  # a killed process leaves the earlier one whole
        self._trainer.save_model(str(new), _internal_call=True)
        if self._trainer.accelerator.is_main_process:
            for name in EXCLUDED:
                path = new / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            record = {"step": state.global_step, "pass@1": accuracy}
            (new / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            shutil.rmtree(self._folder, ignore_errors=True)
            new.rename(self._folder)


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """Step and accuracy of the best adapter of a run; None if there is none."""
    path = Path(output_dir, FOLDER, RECORD)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
