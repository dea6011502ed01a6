"""What runs in a worker of `rewards.workers.pool`: one reward, on one answer or on all of a call."""

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
SECONDS_BETWEEN_LOOKS = 1.0

_reward: Callable[..., list[float | None]]


@dataclass(frozen=True)
class Judged:
    """The scores of some answers, and what the reward logged beside: columns as long as the scores, and numbers."""

    scores: list[float | None]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)


def begin(reward: bytes, parent: int) -> None:
    """Take up a pickled reward, leave Ctrl-C to the parent, and never outlive it."""
    global _reward
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which ends a call into C at once; a handler would wait for it
    if sys.platform == "linux":  # also where a call that never returns holds the interpreter
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    _reward = pickle.loads(reward)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def nothing() -> None:
    """A first task: when it is through, the worker has begun."""


def judge(columns: dict[str, Any], logs: bool) -> Judged:
    """Judge some answers.

    Args:
        columns: `completions` and the others.
        logs: whether the reward is given `log_extra` and `log_metric`.

    Raises:
        ValueError: the reward does not return one score an answer.
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
    except BaseException as error:  # such as SystemExit, which would pass for the parent's own there
        raise RuntimeError(repr(error)) from None
    answers = len(columns["completions"])
    if len(scores) != answers:
        raise ValueError(f"{len(scores)} scores for {answers} completion{'s' if answers > 1 else ''}")
    return Judged([None if score is None else float(score) for score in scores], extra, metrics)
