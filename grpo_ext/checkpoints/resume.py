"""Complete checkpoints, and runs that continue from them as if they had never stopped.

transformers and TRL save the model, the optimizer and their counters. `Checkpoints` adds the fingerprint of the run
(`fingerprint.py`), the state of every part that carries something from step to step (`state.py`), and the manifest that
marks a checkpoint as complete (`files.py`).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from grpo_ext import __version__
from grpo_ext.checkpoints import files
from grpo_ext.checkpoints.files import RUN_FILE
from grpo_ext.checkpoints.fingerprint import accepted_names, differences, explain_differences
from grpo_ext.checkpoints.other_processes import PROCESSES, SHARES, layout, why_impossible
from grpo_ext.checkpoints.state import Stateful, has_states, is_in_rollout, load_states, save_states

REFERENCE_FILE = "reference.safetensors"
logger = get_logger(__name__)
FORMAT = 2  # of a checkpoint; those without a number have format 1 or 2
FORMAT_KEY, VERSION_KEY, ACCEPTED_KEY = "format", "grpo_ext", "accepted_changes"  # in `run.json`
# Parts whose state in a checkpoint is not used if one of these facts has changed: pass rates belong to the rows that
# they were estimated on, stored rewards to their reward functions, and a temperature to its schedule.
OUTDATED_BY = {
    "pools": {"train_dataset"},
    "Replay": {"reward_funcs", "reward_weights", "num_generations_max"},
    "temperature": {"temperature", "temperature_schedule"},
}
OPTIMIZERS = "optimizer.*", "optimizer_*", "global_step*"  # unsharded, sharded by FSDP, sharded by DeepSpeed


class Checkpoints:
    """The checkpoints of one run.

    Args:
        args: arguments of the trainer.
        fingerprint: facts that identify the run.
        states: the parts that carry something from step to step, by name.
        process: index of this process.
        wait: returns when every process has called it.
        device: device of the tensors in `states`.
        reference: a full model that follows the policy (`sync_ref_model` without an adapter); None if there is none.

    Attributes:
        accepted: the changes of settings that this run was resumed with, oldest first:
            [{"step": 5, "name": "learning_rate", "was": 0.001, "is": 0.002}].
        changes_processes: whether the checkpoint that `find` has found last is of another number of processes.
        just_accepted: the names of those since the checkpoint that `find` has found last.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        fingerprint: dict[str, Any],
        states: Mapping[str, Stateful],
        process: int,
        wait: Callable[[], None],
        device: torch.device,
        reference: nn.Module | None = None,
    ):
        self._args, self._fingerprint, self._states = args, fingerprint, states
        self._process, self._wait, self._device = process, wait, device
        self._reference = reference
        self.accepted: list[dict[str, Any]] = []
        self.just_accepted: set[str] = set()
        self.changes_processes = False
        self._state_of = process  # index of the process whose state this one loads

    def find(self, wanted: Any, train_dataset: Any) -> Path | None:
        """The checkpoint that `wanted` names; None to start at step 0.

        Args:
            wanted: a folder; True or "last" for the last complete checkpoint in `output_dir`.
            train_dataset: the training data.

        Raises:
            ValueError: the checkpoint is unfinished or damaged (`files.py`), belongs to another run, differs from
                this one in what `accept_changes` does not name, or cannot be resumed.
        """
        self.accepted, self.just_accepted = [], set()
        self.changes_processes, self._state_of = False, self._process
        folder = files.find_checkpoint(wanted, self._args.output_dir)
        if folder is None:
            return None
        if files.is_foreign(folder):
            logger.warning(
                f"{folder} was written by another trainer. It is resumed as in TRL: with the optimizer and the random "
                f"state, but without the rest of an unfinished rollout."
            )
            return folder
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        self._refuse_newer_format(folder, saved)
        self._change_processes(folder, saved)
        self._accept_changes(folder, saved)
        if not any(any(folder.glob(pattern)) for pattern in OPTIMIZERS):
            raise ValueError(
                f"{folder} has no optimizer state: it was made with save_only_model=True. Start without "
                f"resume_from_checkpoint, and use save_only_model=False for checkpoints that can be resumed."
            )
        if not has_states(folder, self._state_of):
            raise ValueError(
                f"{folder} was made by an earlier version of grpo-ext, which saved the state of a run in another "
                f"format. Resume it with that version, or start without resume_from_checkpoint."
            )
        epoch = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["epoch"]
        if isinstance(train_dataset, IterableDataset) and epoch >= 1:
            raise ValueError(
                f"{folder} was made in pass {int(epoch) + 1} over a streamed data set, and the position in it cannot "
                f"be restored after the first pass. Load the data set without streaming, or resume from a checkpoint "
                f"of the first pass."
            )
        return folder

    def _refuse_newer_format(self, folder: Path, saved: dict[str, Any]) -> None:
        if (number := saved.get(FORMAT_KEY, FORMAT)) > FORMAT:
            raise ValueError(
                f"{folder} has format {number}, of grpo-ext {saved.get(VERSION_KEY)}, and this is grpo-ext "
                f"{__version__}, which reads formats up to {FORMAT}. Update it (pip install -U grpo-ext), or start "
                f"without resume_from_checkpoint."
            )

    def _accept_changes(self, folder: Path, saved: dict[str, Any]) -> None:
        """Keep what has changed since the checkpoint in `accepted`; refuse what the user has not accepted."""
        now = self._fingerprint
        shares = SHARES if self.changes_processes else ()
        changed = [name for name in differences(saved, now) if name not in shares]
        allowed = accepted_names(self._args.accept_changes)
        if any(name not in allowed for name in changed):
            raise ValueError(explain_differences(changed, saved, now))
        if "kl_estimator" in changed and is_in_rollout(folder):
            raise ValueError(
                f"{folder} is in the middle of a rollout, whose reference pass was made for kl_estimator="
                f"{saved['kl_estimator']!r}. Restore it, or use a checkpoint between two rollouts."
            )
        step = files.step_of(folder)
        new = [{"step": step, "name": name, "was": saved[name], "is": now[name]} for name in changed]
        self.accepted = [*saved.get(ACCEPTED_KEY, []), *new]
        self.just_accepted = set(changed)

    def _change_processes(self, folder: Path, saved: dict[str, Any]) -> None:
        """See `other_processes.py`."""
        self.changes_processes = saved[PROCESSES] != self._fingerprint[PROCESSES]
        if not self.changes_processes:
            return
        self._state_of = 0
        is_sharded = any(any(folder.glob(pattern)) for pattern in OPTIMIZERS[1:])
        reason = why_impossible(saved, self._fingerprint, in_a_rollout=is_in_rollout(folder), is_sharded=is_sharded)
        if reason is not None:
            was, now = layout(saved).processes, layout(self._fingerprint).processes
            raise ValueError(
                f"{folder} was made with number of processes={was}, and cannot continue on {now}: {reason}. Or resume "
                f"it with {was}."
            )

    def refuse_foreign(self, resumed: Path | None) -> None:
        """Refuse to train into a folder that holds checkpoints of another trainer, which this run would overwrite.

        Args:
            resumed: the checkpoint that the run starts from; earlier ones would not be overwritten.

        Raises:
            ValueError: there are such checkpoints, and this run saves its own.
        """
        output_dir = Path(self._args.output_dir)
        begin = json.loads((resumed / TRAINER_STATE_NAME).read_bytes())["global_step"] if resumed else 0
        later = [f for f in files.list_checkpoints(output_dir) if files.is_foreign(f) and files.step_of(f) > begin]
        if later and self._args.save_strategy != SaveStrategy.NO:
            names = ", ".join(folder.name for folder in later)
            raise ValueError(
                f"output_dir='{output_dir}' has checkpoints of another trainer ({names}), and this run would overwrite "
                f"them or save its own among them. Use another output_dir, or resume_from_checkpoint=True to continue "
                f"from {later[-1].name}."
            )

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """A context in which transformers writes its part of `folder`; it ends with a complete checkpoint, or none.

        Raises:
            OSError: the checkpoint could not be written; earlier ones are unchanged.
        """
        writes, limit = self._args.should_save, self._args.save_total_limit
        if files.is_foreign(folder):
            raise FileExistsError(
                f"{folder} was written by another trainer and is not overwritten. Use another output_dir."
            )
        if writes:
            files.set_aside(folder)  # it may be complete, or left unfinished by a killed process
        self._wait()
        self._args.save_total_limit = None  # transformers would delete old ones before the new one is complete
        try:
            if writes:
                folder.mkdir(parents=True)
                (folder / RUN_FILE).write_text(json.dumps(self._run_facts(), indent=1) + "\n", encoding="utf-8")
            yield
            save_states(folder, self._process, {name: part.state_dict() for name, part in self._states.items()})
            if self._reference is not None and writes:
                save_model(self._reference, str(folder / REFERENCE_FILE))
            self._wait()
            if writes:
                files.seal(folder)
                files.forget_replaced(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if writes:
                files.remove(folder)
                files.put_back(folder)
            free = shutil.disk_usage(folder.parent).free / 1e6
            raise OSError(
                f"{folder} could not be written: {error} ({free:.0f} MB are free). Earlier checkpoints are unchanged. "
                f"Make room, then run the same command with --resume_from_checkpoint last."
            ) from error
        finally:
            self._args.save_total_limit = limit

    def _run_facts(self) -> dict[str, Any]:
        facts = {FORMAT_KEY: FORMAT, VERSION_KEY: __version__} | self._fingerprint
        return facts | ({ACCEPTED_KEY: self.accepted} if self.accepted else {})

    def rotate(self, folder: Path, best: str | None) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, except `folder` and the best one."""
        if self._args.should_save:
            kept = {folder, *([Path(best)] if best else [])}
            files.rotate(folder.parent, self._args.save_total_limit, kept)

    def load(self, folder: Path) -> None:
        """Restore the parts whose states are in the checkpoint, and a reference that follows the policy.

        The other parts keep their initial state: the watch, if the earlier session had `guards=False`, a part that had
        no state in the version that wrote the checkpoint, and one whose state is outdated by an accepted change.
        """
        if self.just_accepted:
            logger.warning(f"{folder} is continued with other values of {', '.join(sorted(self.just_accepted))}.")
        if self.changes_processes:
            logger.warning(f"{folder} is continued on another number of processes, with other random numbers.")
        states = load_states(folder, self._state_of, self._device)
        for name, facts in OUTDATED_BY.items():
            if (changed := sorted(facts & self.just_accepted)) and states.pop(name, None) is not None:
                logger.warning(f"The state of {name!r} in the checkpoint is not used: changed {', '.join(changed)}.")
        for name, part in self._states.items():
            if name in states:
                part.load_state_dict(states[name])
        if self._reference is not None and (folder / REFERENCE_FILE).exists():
            load_model(self._reference, str(folder / REFERENCE_FILE))
