"""Checkpoints that are whole, or known not to be: what lies in them is listed with sizes and hashes, last of all.

    checkpoint-20/
        adapter_model.safetensors, optimizer.pt, rng_state.pth, trainer_state.json, ...
        complete.json                   {"optimizer.pt": {"bytes": 9347, "sha256": "5d41..."}, ...}

`complete.json` is renamed into place when everything else is on the disk: a folder without it was not written to its
end, and one that does not agree with it was damaged since.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETE, REMOVED = "complete.json", "removed-"
LAST, NONE = ("last", "true"), ("", "none", "false")  # as text, which is what a command line delivers

logger = logging.getLogger(__name__)


def find(wanted: str | bool | os.PathLike[str] | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from; None to begin at step 0.

    Args:
        wanted: a folder; True, "true" or "last" for the last one in `output_dir` that is whole, those that are not
            being named in the log and passed over; None, False or "false" for none.

    Raises:
        ValueError: the folder that was asked for is not whole, or checkpoints were finished here once and none is whole
            any more. Without a finished one, the run was killed before its first, and "last" begins at step 0.
    """
    text = str(wanted).lower()
    if text in NONE:
        return None
    if text in LAST and not (isinstance(wanted, str) and Path(wanted).is_dir()):
        return _last(Path(output_dir))
    folder = Path(str(wanted))
    reason = fault(folder)
    if reason is not None:
        others = checkpoints(folder) or checkpoints(folder.parent)  # a run's own folder was meant, maybe
        whole = [str(other) for other in others if fault(other) is None]
        instead = f"Use {whole[-1]}" if whole else "Start without resume"
        raise ValueError(f"resume_from_checkpoint='{folder}' cannot be resumed: {reason}. {instead}.")
    return folder


def _last(output_dir: Path) -> Path | None:
    faults: dict[Path, str] = {}
    for folder in reversed(checkpoints(output_dir)):
        reason = fault(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is passed over: {reason}.")
        faults[folder] = reason
    if any((folder / COMPLETE).exists() for folder in faults):
        named = "; ".join(f"{folder.name}: {reason}" for folder, reason in faults.items())
        raise ValueError(f"No checkpoint in {output_dir} is whole. {named}. Restore one, or start without resume.")
    logger.warning(f"There is no finished checkpoint in {output_dir}: the run begins at step 0.")
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, by their step."""
    found = {
        int(step): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and (step := folder.name.rpartition("-")[2]).isdecimal()
    }
    return [found[step] for step in sorted(found)]


def fault(folder: Path) -> str | None:
    """Why this folder cannot be resumed from, naming the file; None where every file is as it was written."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        listed = json.loads((folder / COMPLETE).read_bytes())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it was not written to its end (no {COMPLETE})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{COMPLETE} cannot be read"
    if not files:
        return f"{COMPLETE} lists nothing"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and {size} were written"
        if _sha256(path) != digest:
            return f"{name} is not what was written (its hash differs)"
    return None


def seal(folder: Path) -> None:
    """Say that the folder is complete: list its files, once all of them are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / COMPLETE)
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    new = folder / f"{COMPLETE}.new"
    new.write_text(json.dumps(listed, indent=1) + "\n")
    for path in (*paths, new, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(path)
    new.replace(folder / COMPLETE)
    _sync(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint, if it is there; first its name, so that one that is half deleted is none any more."""
    removed = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest finished checkpoints until `limit` are left, but none of `keep`; None or 0 deletes nothing."""
    finished = [folder for folder in checkpoints(output_dir) if (folder / COMPLETE).exists()]
    finished.sort(key=lambda folder: (folder / COMPLETE).stat().st_mtime_ns)
    spare = [folder for folder in finished if folder.resolve() not in {kept.resolve() for kept in keep}]
    for folder in spare[: max(0, len(finished) - limit)] if limit else []:
        remove(folder)
    for half_deleted in output_dir.glob(f"{REMOVED}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(half_deleted, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written to this file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
