"""The code that runs in a worker process of `rewards.workers.pool`: one reward, on one completion or a whole call."""

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux: the signal that this process gets when its parent ends
PARENT_POLL_SECONDS = 1.0

_reward: Callable[..., list[float | None]]


@dataclass(frozen=True)
class WorkerResult:
    """What a worker sends back for the completions of one task.

    Attributes:
        scores: one per completion; None if the reward returned None.
        extra: columns that the reward passed to `log_extra`, each as long as `scores`.
        metrics: (name, value) pairs that the reward passed to `log_metric`.
    """

    scores: list[float | None]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)


def init_worker(reward: bytes, parent: int) -> None:
    """Unpickle the reward, leave Ctrl-C to the parent, and make sure that this process never outlives it.

    Args:
        reward: the reward function, pickled by cloudpickle.
        parent: process id of the parent.
    """
    global _reward
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a call into C at once; a Python handler would wait for it
    if sys.platform == "linux":  # works even if a call that never returns holds the GIL
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _reward = pickle.loads(reward)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def ping() -> None:
    """Do nothing. The result of this first task shows that a worker has started and unpickled the reward."""


def run_reward(columns: dict[str, Any], logs: bool) -> WorkerResult:
    """Call the reward of this worker.

    Args:
        columns: keyword arguments of the reward: `completions` and the columns of the data set.
        logs: whether to pass `log_extra` and `log_metric` as well.

    Raises:
        ValueError: the reward did not return one score per completion.
        RuntimeError: the reward raised a `BaseException` that is no `Exception`.
    """
    extra: dict[str, list[Any]] = {}
    metrics: list[tuple[str, float]] = []
    loggers = {
        "log_extra": lambda column, values: extra.update({column: list(values)}),
        "log_metric": lambda name, value: metrics.append((name, float(value))),
    }
    try:
        scores = _reward(**columns, **(loggers if logs else {}))
    except Exception:
        raise
    except BaseException as error:  # SystemExit, for example, would be raised again in the parent and end it
        raise RuntimeError(repr(error)) from None
    expected = len(columns["completions"])
    if len(scores) != expected:
        raise ValueError(f"{len(scores)} scores for {expected} completion{'s' if expected > 1 else ''}")
    return WorkerResult([None if score is None else float(score) for score in scores], extra, metrics)
