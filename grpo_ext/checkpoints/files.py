"""Tell complete checkpoints from unfinished and damaged ones by a manifest of sizes and hashes.

    checkpoint-20/
        adapter_model.safetensors, optimizer.pt, rng_state.pth, trainer_state.json, ...
        complete.json                   {"optimizer.pt": {"bytes": 9347, "sha256": "5d41..."}, ...}

`complete.json`, the manifest, is renamed into place once everything else is on the disk. A folder without it is
unfinished; a folder that does not match it was damaged later. `run.json` is the first file written: a checkpoint
without it comes from another trainer, such as stock TRL, and is never deleted.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

RUN_FILE, MANIFEST = "run.json", "complete.json"
REMOVED_PREFIX, REPLACED_PREFIX = "removed-", "replaced-"  # of folders about to be deleted or written again
# Values of `resume_from_checkpoint`, in lower case; on a command line they are text.
LAST, NONE = ("last", "true"), ("", "none", "false")

logger = logging.getLogger(__name__)


def find_checkpoint(wanted: str | bool | os.PathLike[str] | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from; None to start at step 0.

    Args:
        wanted: a folder; True, "true" or "last" for the last complete checkpoint in `output_dir` (others are skipped
            with a warning); None, False or "false" for none.

    Raises:
        ValueError: the requested folder is unfinished or damaged, or all finished checkpoints in `output_dir` are
            damaged. If none is finished, the run was killed before its first checkpoint, and "last" starts at step 0.
    """
    text = str(wanted).lower()
    if text in NONE:
        return None
    if text in LAST and not (isinstance(wanted, str) and Path(wanted).is_dir()):
        return _find_last(Path(output_dir))
    folder = Path(str(wanted))
    reason = why_unusable(folder)
    if reason is not None:
        others = list_checkpoints(folder) or list_checkpoints(folder.parent)  # `folder` may be the folder of a run
        whole = [str(other) for other in others if why_unusable(other) is None]
        instead = f"Use {whole[-1]}" if whole else "Start without resume_from_checkpoint"
        raise ValueError(f"resume_from_checkpoint='{folder}' cannot be resumed: {reason}. {instead}.")
    return folder


def _find_last(output_dir: Path) -> Path | None:
    skipped: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(output_dir)):
        reason = why_unusable(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is skipped: {reason}.")
        skipped[folder] = reason
    if any((folder / MANIFEST).exists() for folder in skipped):
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped.items())
        raise ValueError(
            f"No checkpoint in {output_dir} is complete. {reasons}. Restore one, or start without "
            f"resume_from_checkpoint."
        )
    logger.warning(f"There is no finished checkpoint in {output_dir}: the run starts at step 0.")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, in the order of their steps."""
    found = [
        folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, from the name of its folder."""
    return int(folder.name.rpartition("-")[2])


def is_foreign(folder: Path) -> bool:
    """Whether another trainer, such as stock TRL, wrote this checkpoint."""
    return (folder / TRAINER_STATE_NAME).exists() and not any((folder / name).exists() for name in (RUN_FILE, MANIFEST))


def why_unusable(folder: Path) -> str | None:
    """Why this folder cannot be resumed from, naming the file; None if every file is as it was written. In a checkpoint
    of another trainer, only `trainer_state.json` is checked, the last file written."""
    if not folder.is_dir():
        return "there is no such folder"
    if is_foreign(folder):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_bytes())
        except ValueError:
            return f"{TRAINER_STATE_NAME} cannot be read"
        return None
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it is unfinished (no {MANIFEST})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not files:
        return f"{MANIFEST} lists nothing"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} has changed since it was written (its hash differs)"
    return None


def seal(folder: Path) -> None:
    """Mark the folder as complete: write the manifest, once all other files are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    new = folder / f"{MANIFEST}.new"
    new.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    for path in (*paths, new, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(path)
    new.replace(folder / MANIFEST)
    _sync(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint if it exists. Renamed first, so that a half-deleted one does not look like a checkpoint."""
    removed = folder.with_name(f"{REMOVED_PREFIX}{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Make room for a new checkpoint in this place: rename a complete one, and delete an unfinished one."""
    if not (folder / MANIFEST).exists():
        remove(folder)
        return
    forget_replaced(folder)
    folder.rename(_replaced(folder))


def put_back(folder: Path) -> None:
    """Restore the checkpoint that `set_aside` renamed, if there is one."""
    if _replaced(folder).exists():
        _replaced(folder).rename(folder)


def forget_replaced(folder: Path) -> None:
    """Delete the checkpoint that `set_aside` renamed, if there is one."""
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f"{REPLACED_PREFIX}{folder.name}")


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest finished checkpoints until `limit` are left, except those in `keep`; None or 0 deletes none."""
    finished = [folder for folder in list_checkpoints(output_dir) if (folder / MANIFEST).exists()]
    finished.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns)
    deletable = [folder for folder in finished if folder.resolve() not in {kept.resolve() for kept in keep}]
    for folder in deletable[: max(0, len(finished) - limit)] if limit else []:
        remove(folder)
    for half_deleted in output_dir.glob(f"{REMOVED_PREFIX}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(half_deleted, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush this file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
