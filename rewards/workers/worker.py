"""The process that runs rewards for `pool.py`: it receives a task, calls the reward, and sends the result.

A task is answered by `Started`, once the reward and its arguments are unpickled, and then by a `WorkerResult` or a
`Failure`. In between, the log records of the reward are sent to the training process, whose handlers print them.
"""

import ctypes
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from types import FrameType, SimpleNamespace
from typing import Any, Literal

PR_SET_PDEATHSIG = 1  # Linux: the signal that this process gets when the thread that started it ends
PARENT_POLL_SECONDS = 1.0
END = b""  # sent in place of a task to end the worker


class RunState(SimpleNamespace):
    """What a worker gets as `trainer_state`: the fields of transformers' `TrainerState`, without `log_history`."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer_state.{name} is not sent to a worker. Call this reward in the training process, without "
            f"isolated(...) and reward_workers: there it gets TRL's own trainer_state."
        )


@dataclass(frozen=True)
class Task:
    """One call of a reward.

    Attributes:
        key: key of the reward.
        reward: the reward, pickled by cloudpickle; None if this worker has it already.
        arguments: keyword arguments of the reward, pickled by cloudpickle.
        logs: whether to pass `log_extra` and `log_metric` as well.
        seed: seed of `random`, and of numpy and torch if this worker has imported them.
        folder: the working directory of the training process.
        log_levels: the levels of the training process's loggers by name, "" for the root logger; sent with the reward.
    """

    key: int
    arguments: bytes
    logs: bool
    seed: str
    folder: str
    reward: bytes | None = None
    log_levels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The reward is about to be called. What comes before, such as its imports, does not count towards its time."""


@dataclass(frozen=True)
class WorkerResult:
    """What a reward returned for the completions of one task.

    Attributes:
        scores: one per completion; None if the reward returned None.
        extra: (column, values) pairs that the reward passed to `log_extra`.
        metrics: (name, value) pairs that the reward passed to `log_metric`.
    """

    scores: list[float | None]
    extra: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """Why a task has no result.

    Attributes:
        kind: "setup" if the reward was not called, for example because it could not be unpickled.
        reason: what the reward did, as a predicate, such as "raised KeyError('answer')".
        trace: the traceback in the worker; "" if there is none.
    """

    kind: Literal["timeouts", "crashes", "errors", "setup"]
    reason: str
    trace: str = ""


Answer = Started | WorkerResult | Failure | logging.LogRecord


def serve(connection: Connection, parent: int, start_method: str | None) -> None:
    """Process incoming tasks until `END`, or until the training process ends.

    Args:
        connection: connection to the training process.
        parent: process id of the training process; this process never outlives it.
        start_method: start method of `multiprocessing` in the training process, for rewards that start processes.
    """
    _prepare_process(parent, start_method)
    lock = threading.Lock()
    rewards: dict[int, Any] = {}

    def send(answer: Answer) -> None:
        message = pickle.dumps(answer)
        with lock:
            connection.send_bytes(message)

    logging.getLogger().addHandler(_SendRecords(send))
    while (message := _receive(connection)) != END:
        with _killed_with(parent):
            answer = _run(pickle.loads(message), rewards, send)
        send(answer)


def _receive(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except EOFError:  # the training process has ended
        return END


def _run(task: Task, rewards: dict[int, Any], send: Callable[[Answer], None]) -> WorkerResult | Failure:
    """Run a task. `rewards` keeps the reward under its key for later tasks."""
    _follow(task)
    try:
        if task.reward is not None:
            rewards[task.key] = pickle.loads(task.reward)
        arguments = pickle.loads(task.arguments)
    except BaseException as error:  # unpickling imports modules of the user, which may raise anything
        return Failure("setup", repr(error), traceback.format_exc())
    _seed(task.seed)
    send(Started())
    answer = _call(rewards[task.key], arguments, logs=task.logs)
    sys.stdout.flush()  # it would be lost if the worker were killed
    sys.stderr.flush()
    return answer


def _prepare_process(parent: int, start_method: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    # Schedulers send it to every process of a job.
    signal.signal(signal.SIGTERM, partial(_leave_to_parent, os.getpid()))
    if hasattr(os, "setsid"):
        os.setsid()  # its own group, which can be killed together with the processes that a reward has started
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    # loky's own method cannot start other kinds of processes
    multiprocessing.set_start_method(start_method, force=True)


def _leave_to_parent(worker: int, number: int, frame: FrameType | None) -> None:
    """Ignore the signal in the worker; a process that a reward has forked ends as usual."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def _killed_with(parent: int) -> Iterator[None]:
    """End this process with its parent during a task, even if a call that never returns holds the GIL.

    Linux does so when the thread that started this process ends. An idle worker must outlive that thread.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that line
        os._exit(1)
    yield
    prctl(PR_SET_PDEATHSIG, 0)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


class _SendRecords(QueueHandler):
    """Sends log records to the training process, as text."""

    def __init__(self, send: Callable[[logging.LogRecord], None]):
        super().__init__(None)  # type: ignore[arg-type]  # only `enqueue` would use a queue
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send(record)


def _follow(task: Task) -> None:
    """Adopt the working directory and the log levels of the training process."""
    os.chdir(task.folder)
    for name, level in task.log_levels.items():
        logging.getLogger(name or None).setLevel(level)


def _seed(seed: str) -> None:
    numbers = random.Random(seed)
    random.seed(numbers.getrandbits(64))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(numbers.getrandbits(32))
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(numbers.getrandbits(63))


def _call(reward: Callable[..., Any], arguments: dict[str, Any], *, logs: bool) -> WorkerResult | Failure:
    extra: list[tuple[str, list[Any]]] = []
    metrics: list[tuple[str, float]] = []
    loggers: dict[str, Callable[[str, Any], None]] = {
        "log_extra": lambda column, values: extra.append((column, list(values))),
        "log_metric": lambda name, value: metrics.append((name, float(value))),
    }
    try:
        scores = list(reward(**arguments, **(loggers if logs else {})))
        expected = len(arguments["completions"])
        if len(scores) != expected:
            raise ValueError(f"{len(scores)} scores for {expected} completion{'s' if expected > 1 else ''}")
        result = WorkerResult([_as_number(score) for score in scores], extra, metrics)
        pickle.dumps(result)
    except BaseException as error:  # including SystemExit, which ends the task, not the worker
        return Failure("errors", f"raised {error!r}", traceback.format_exc())
    return result


def _as_number(score: Any) -> float | None:
    """The score as TRL converts it: `float` of anything but text."""
    if isinstance(score, str | bytes):
        raise TypeError(f"{score!r} is not a score; valid: a number, or None")
    return None if score is None else float(score)
