"""Worker processes, and pools of them, which run tasks of `worker.py` in parallel, each in bounded time.

A worker that ends while it is idle costs nothing: the next task starts another one. A worker that ends or exceeds the
time limit during a call costs that task. A task whose worker ends or hangs before the call moves to another worker.

Workers live until `close()`, or until this process ends in any way. They do not import the main module again: a script
that loads a model does not load it twice, and the reward may still be a function of that script.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from loky.backend import get_context

from grpo_ext.rewards.workers.worker import END, Answer, Failure, Started, Task, WorkerResult, serve

WORKER_NAME = "reward_worker"  # in the command line of the process
TICK_SECONDS = 0.2  # how often to check that a process with an open connection is still alive and in time
SETUP_SECONDS = 600  # time limit for everything before a call: sending the task, and the imports of the reward
END_SECONDS = 5.0  # how long an idle worker may take to end by itself, for example to write out its files
MAX_LOST_STARTS = 3  # workers in a row that end before they call the reward


class Worker:
    """One process that runs tasks.

    Attributes:
        connection: to the process.
        keys: keys of the rewards that it has received.
    """

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        if sys.platform == "linux":
            _limit_waiting(self.connection.fileno(), SETUP_SECONDS)
        method = multiprocessing.get_start_method(allow_none=True)
        context = get_context("loky")
        self._process = context.Process(target=serve, args=(theirs, os.getpid(), method), name=WORKER_NAME)
        self._process.start()
        theirs.close()
        self.keys: set[int] = set()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def send(self, task: Task) -> bool:
        """Send a task; False if the process has ended, or does not receive it in SETUP_SECONDS."""
        try:
            self.connection.send_bytes(pickle.dumps(task))
        except OSError:
            return False
        self.keys.add(task.key)
        return True

    def receive(self) -> Answer | None:
        """The next answer, which must have arrived; None if the process has ended."""
        try:
            answer: Answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return answer

    def ask_to_end(self) -> None:
        """Let an idle process end by itself."""
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.send_bytes(END)

    def end(self, seconds: float = 0.0) -> int | None:
        """Wait up to `seconds` for the process to end, then kill it and the processes that it has started.

        Returns:
            Its exit code, or minus the number of the signal that ended it.
        """
        self._process.join(seconds)
        if self._process.is_alive():
            if not self._kill_group():
                self._process.kill()  # it has no group (yet)
            self._process.join()
        elif not _exists(self._process.pid):  # else the number belongs to another process, so the group was empty
            self._kill_group()
        self.connection.close()
        return self._process.exitcode

    def _kill_group(self) -> bool:
        """Kill the processes that the worker has started, and the worker. False if there are none."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (AttributeError, OSError):
            return False
        return True


def _limit_waiting(connection: int, seconds: int) -> None:
    """Let each read and each write of a socket fail if the other side makes it wait for longer than this."""
    with socket.socket(fileno=os.dup(connection)) as same:
        same.setblocking(True)  # in case of socket.setdefaulttimeout
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def _exists(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@dataclass
class _Running:
    """A task in a worker.

    Attributes:
        index: which task of its batch.
        deadline: when to end the worker, on the clock of `time.monotonic`.
        is_called: whether the reward has been called.
    """

    index: int
    deadline: float
    is_called: bool = False


@dataclass
class _Batch:
    """The tasks of one call of `WorkerPool.run`, and what has become of them.

    Attributes:
        tasks, reward, timeout_s: arguments of that call.
        waiting: indices of the tasks that no worker has.
        results: result per index.
        lost_starts: workers in a row that failed before they called the reward.
    """

    tasks: Sequence[Task]
    reward: bytes
    timeout_s: float
    waiting: deque[int]
    results: dict[int, WorkerResult | Failure] = field(default_factory=dict)
    lost_starts: int = 0

    def fail(self, running: _Running, failure: Failure) -> None:
        """Record the failure of a task whose worker has been removed; before its call, another worker can run it."""
        if running.is_called:
            self.results[running.index] = failure
        else:
            self.waiting.appendleft(running.index)
            self.lose_start(failure.reason)

    def lose_start(self, reason: str) -> None:
        """Count a worker that failed before it called the reward.

        Raises:
            SetupError: this happened MAX_LOST_STARTS times in a row.
        """
        self.lost_starts += 1
        if self.lost_starts == MAX_LOST_STARTS:
            raise SetupError(Failure("setup", f"{MAX_LOST_STARTS} workers failed before calling it; the last {reason}"))


class WorkerPool:
    """A fixed number of workers, which start when they are first needed.

    Attributes:
        epoch: how often the pool has been closed; the workers of an epoch know nothing of earlier ones.
        replaced: how many workers ended by themselves or were killed.
    """

    def __init__(self, size: int):
        self._size = size
        self.epoch = 0
        self.replaced = 0
        self._workers: list[Worker] = []
        self._busy: dict[Worker, _Running] = {}
        self._lock = threading.RLock()
        self._process_id = os.getpid()
        _pools.add(self)
        weakref.finalize(self, _end_workers, self._workers, self._busy, self._process_id).atexit = False

    def start(self) -> None:
        """Start all workers, without waiting for them."""
        with self._lock:
            self._begin()
            while len(self._workers) < self._size:
                self._workers.append(Worker())

    def run(self, tasks: Sequence[Task], reward: bytes, timeout_s: float) -> list[WorkerResult | Failure]:
        """Run tasks of one reward, and return their results in order.

        Args:
            tasks: the tasks, without the reward.
            reward: the reward, pickled by cloudpickle, for workers that do not have it.
            timeout_s: seconds per task, from the call of the reward.

        Raises:
            SetupError: the reward cannot be set up in a worker.
        """
        with self._lock:
            self._begin()
            try:
                return self._run(_Batch(tasks, reward, timeout_s, waiting=deque(range(len(tasks)))))
            finally:
                for worker in list(self._busy):  # after an exception or Ctrl-C
                    self._remove(worker)

    def close(self) -> None:
        """End the workers; the next task starts new ones."""
        with self._lock:
            _end_workers(self._workers, self._busy, self._process_id)
            self.epoch += 1

    def _begin(self) -> None:
        if self._process_id != os.getpid():  # a fork: the workers belong to the process that started them
            self._workers, self._busy, self._process_id = [], {}, os.getpid()
            weakref.finalize(self, _end_workers, self._workers, self._busy, self._process_id).atexit = False

    def _run(self, batch: _Batch) -> list[WorkerResult | Failure]:
        while len(batch.results) < len(batch.tasks):
            self._assign(batch)
            arrived = set(wait([worker.connection for worker in self._busy], TICK_SECONDS))
            for worker, running in list(self._busy.items()):
                if worker.connection in arrived:
                    self._handle(worker.receive(), worker, running, batch)
                elif not worker.is_alive:
                    self._handle(None, worker, running, batch)
                if worker in self._busy and time.monotonic() > running.deadline:
                    seconds = batch.timeout_s if running.is_called else SETUP_SECONDS
                    self._remove(worker)
                    batch.fail(running, Failure("timeouts", f"took longer than {seconds:g} s"))
        return [batch.results[index] for index in range(len(batch.tasks))]

    def _assign(self, batch: _Batch) -> None:
        """Send waiting tasks to idle workers."""
        while batch.waiting and (worker := self._idle_worker()) is not None:
            task = batch.tasks[batch.waiting[0]]
            if task.key not in worker.keys:
                task = replace(task, reward=batch.reward, log_levels=_log_levels())
            if worker.send(task):
                self._busy[worker] = _Running(batch.waiting.popleft(), time.monotonic() + SETUP_SECONDS)
            else:
                self._remove(worker)
                batch.lose_start("did not receive its task")

    def _handle(self, answer: Answer | None, worker: Worker, running: _Running, batch: _Batch) -> None:
        """Handle an answer; None means that the process of the worker has ended."""
        match answer:
            case logging.LogRecord():
                logging.getLogger(answer.name).handle(answer)
            case Started():
                running.is_called, running.deadline = True, time.monotonic() + batch.timeout_s
            case Failure(kind="setup"):
                raise SetupError(answer)
            case WorkerResult() | Failure():
                del self._busy[worker]
                batch.results[running.index], batch.lost_starts = answer, 0
            case None:
                code = self._remove(worker)
                batch.fail(running, Failure("crashes", f"ended its process with exit code {code}"))

    def _idle_worker(self) -> Worker | None:
        for worker in [worker for worker in self._workers if worker not in self._busy]:
            if worker.is_alive:
                return worker
            self._remove(worker)
        if len(self._workers) == self._size:
            return None
        self._workers.append(Worker())
        return self._workers[-1]

    def _remove(self, worker: Worker) -> int | None:
        """End a worker at once, and return its exit code."""
        self._busy.pop(worker, None)
        if worker in self._workers:
            self._workers.remove(worker)
            self.replaced += 1
        return worker.end()


def _log_levels() -> dict[str, int]:
    loggers = {"": logging.getLogger(), **logging.getLogger().manager.loggerDict}
    levels = {name: getattr(logger, "level", logging.NOTSET) for name, logger in loggers.items()}
    return {name: level for name, level in levels.items() if level != logging.NOTSET}


class SetupError(RuntimeError):
    """A reward or its arguments could not be unpickled in a worker, or no worker got as far as calling it."""

    def __init__(self, failure: Failure):
        super().__init__(failure.reason)
        if failure.trace:
            self.add_note(failure.trace)


def shared_pool(size: int) -> WorkerPool:
    """The pool with this number of workers, shared by all rewards that score completions independently."""
    with _lock:
        pool = _shared_pools.get(size)
        if pool is None:
            pool = _shared_pools[size] = WorkerPool(size)
        return pool


def start_pools(pools: Iterable[WorkerPool]) -> None:
    """Start the workers of these pools in parallel, without waiting for them."""
    for pool in dict.fromkeys(pools):
        pool.start()


def close_pools(pools: Iterable[WorkerPool]) -> None:
    """End the workers of these pools."""
    for pool in dict.fromkeys(pools):
        pool.close()


_pools: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()
_shared_pools: "weakref.WeakValueDictionary[int, WorkerPool]" = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _end_workers(workers: list[Worker], busy: dict[Worker, _Running], process_id: int) -> None:
    """Let idle workers end by themselves, within END_SECONDS, and end busy ones at once."""
    if process_id != os.getpid():
        return
    idle = [worker for worker in workers if worker not in busy]
    for worker in idle:
        worker.ask_to_end()
    for worker in list(busy):
        worker.end()
    deadline = time.monotonic() + END_SECONDS
    for worker in idle:
        worker.end(max(0.0, deadline - time.monotonic()))
    workers.clear()
    busy.clear()


@atexit.register  # registered after that of multiprocessing, which waits for every child, so called before it
def _end_all() -> None:
    for pool in list(_pools):
        _end_workers(pool._workers, pool._busy, pool._process_id)
