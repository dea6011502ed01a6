"""TRL's trainer with checkpoints that are whole, and runs that go on from them as if they had never stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from grpo_ext.checkpoints import files
from grpo_ext.checkpoints.fingerprint import fingerprint, first_difference
from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.replay import ReplayTrainer

RUN_FILE, REFERENCE_FILE = "run.json", "reference.safetensors"
OPTIMIZERS = "optimizer.*", "optimizer_*", "global_step*"  # of one piece, of FSDP in shards, of DeepSpeed
# Of each process, by its number.
STATE_FILE, ROLLOUT_FILE = "state_{}.json", "rollout_{}.safetensors"
# What one optimizer step leaves to the next, beside what transformers, TRL and the mechanisms before save themselves:
# micro-steps of the run, whether the sampler's log-probs are believed, and the entropy (nats) that is shown for rows
# that were left out.
CARRIED = ("_step", "_sampler_agrees", "_entropy_of_scored")
# Of TRL's table of completions.
LOGGED, LOGGED_COLUMNS = ("prompt", "completion", "advantages"), ("rewards", "extra")


class ResumeTrainer(ReplayTrainer):
    """TRL's `GRPOTrainer` with these differences:

    - A run that is resumed is the run that was not stopped, to the bit on a CPU: transformers and TRL lose the rollout
      that is in use, the place in it, the order of prompts from the second pass on, and the sum of losses.
    - `train(resume_from_checkpoint="last")`, or True, takes the last checkpoint in `output_dir` that is whole
      (`checkpoints/files.py`). One that a run with another model, adapter, data set or other settings made is refused,
      naming the first difference (`checkpoints/fingerprint.py`).
    - A step that is saved is also logged. A finished run that is resumed trains no further step.
    - A checkpoint that cannot be written stops the run, and the one before it stays.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        facts = [fingerprint(self) if self.accelerator.is_main_process else None]
        self._fingerprint = broadcast_object_list(facts)[0]  # others may hold a part of the model only
        self._train_sampler: Sampler | None = None
        self._losses_before = 0.0  # logged before this session
        self.add_callback(_CarriesLosses(self))

    # Resume

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = self.find_checkpoint(resume_from_checkpoint)
        self._losses_before = 0.0
        evaluates_first = self.args.eval_on_start
        self.args.eval_on_start = evaluates_first and folder is None  # the run did so when it began
        try:
            return super().train(folder and str(folder), *args, **kwargs)
        finally:
            self.args.eval_on_start = evaluates_first

    def find_checkpoint(self, wanted: Any) -> Path | None:
        """The checkpoint that `train(resume_from_checkpoint=wanted)` resumes from; None where it begins at step 0.

        Raises:
            ValueError: none that is asked for is whole (`checkpoints/files.py`), or it is another run's.
        """
        folder = files.find_checkpoint(wanted, self.args.output_dir)
        if folder is None:
            return None
        difference = first_difference(json.loads((folder / RUN_FILE).read_text()), self._fingerprint)
        if difference is not None:
            raise ValueError(difference)
        if not any(any(folder.glob(pattern)) for pattern in OPTIMIZERS):
            raise ValueError(
                f"{folder} holds no optimizer: it was made with save_only_model=True. Start without resume, and make "
                f"checkpoints with save_only_model=False."
            )
        epoch = json.loads((folder / TRAINER_STATE_NAME).read_text())["epoch"]
        if isinstance(self.train_dataset, IterableDataset) and epoch >= 1:
            raise ValueError(
                f"{folder} was made in pass {int(epoch) + 1} over a streamed data set, whose place cannot be found "
                f"again. Load the data set whole, or resume from a checkpoint of the first pass."
            )
        return folder

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._train_sampler is not None:
            for _ in range(int(self.state.epoch)):  # each pass draws an order when it begins
                next(iter(self._train_sampler))
        self._load_state(Path(checkpoint))

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # transformers divides by the steps of this session
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    # Checkpoints

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        may_save = control.should_evaluate and self.args.save_strategy == SaveStrategy.BEST
        control.should_log = control.should_log or control.should_save or may_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writes, limit = self.args.should_save, self.args.save_total_limit
        if writes:
            files.remove(folder)  # of an attempt that was killed
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None  # transformers would delete before the new one is whole
        try:
            super()._save_checkpoint(model, trial)
            self._save_state(folder)
            self.accelerator.wait_for_everyone()
            if writes:
                (folder / RUN_FILE).write_text(json.dumps(self._fingerprint, indent=1) + "\n")
                files.seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if writes:
                files.remove(folder)
            free = shutil.disk_usage(output_dir).free / 1e6
            raise OSError(
                f"{folder} could not be written: {error} ({free:.0f} MB are free). Earlier checkpoints are as they "
                f"were: make room, then run the same command with --resume_from_checkpoint last."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if writes:
            best = self.state.best_model_checkpoint
            files.rotate(output_dir, limit, {folder, *([Path(best)] if best else [])})

    def _save_state(self, folder: Path) -> None:
        rank, buffered = self.accelerator.process_index, self._buffered_inputs
        state = {name: getattr(self, name) for name in CARRIED}
        state |= {"losses": self._total_loss_scalar, "entropy_seen": self._entropy_seen.tolist()}
        if buffered is not None and self._step % (self.args.steps_per_generation * self.num_iterations):
            tensors = {
                f"{i}/{name}": value
                for i, part in enumerate(buffered)
                for name, value in part.items()
                if isinstance(value, torch.Tensor)
            }
            state["rest"] = [{k: v for k, v in part.items() if not isinstance(v, torch.Tensor)} for part in buffered]
            state["on_host"] = [key for key, value in tensors.items() if value.device.type == "cpu"]
            logs: dict[str, Any] = {name: list(self._logs[name]) for name in LOGGED}
            logs |= {kind: {name: list(of) for name, of in self._logs[kind].items()} for kind in LOGGED_COLUMNS}
            state["logs"] = json.loads(json.dumps(logs, default=str))  # rewards may log what JSON has no form for
            copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
            save_file(copies, folder / ROLLOUT_FILE.format(rank))
        (folder / STATE_FILE.format(rank)).write_text(json.dumps(state))
        if self.args.sync_ref_model and self.ref_model is not None and self.args.should_save:
            save_model(self.ref_model, str(folder / REFERENCE_FILE))

    def _load_state(self, folder: Path) -> None:
        rank, device = self.accelerator.process_index, self.accelerator.device
        state = json.loads((folder / STATE_FILE.format(rank)).read_text())
        for name in CARRIED:
            setattr(self, name, state[name])
        self._losses_before = state["losses"]
        self._entropy_seen = self._entropy_seen.new_tensor(state["entropy_seen"])
        self._buffered_inputs = None
        if "rest" in state:
            self._buffered_inputs = parts = state["rest"]
            for key, value in load_file(folder / ROLLOUT_FILE.format(rank)).items():
                i, _, name = key.partition("/")
                parts[int(i)][name] = value if key in state["on_host"] else value.to(device)
            for name in LOGGED:
                self._logs[name].extend(state["logs"][name])
            for kind in LOGGED_COLUMNS:
                for name, values in state["logs"][kind].items():
                    self._logs[kind][name].extend(values)
        if (folder / REFERENCE_FILE).exists():
            load_model(self.ref_model, str(folder / REFERENCE_FILE))


class _CarriesLosses(TrainerCallback):
    """Counts the losses that were logged before the run was stopped; transformers begins at 0 in each session."""

    def __init__(self, trainer: ResumeTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after transformers has set the sum to 0."""
        self._trainer._total_loss_scalar = self._trainer._losses_before
