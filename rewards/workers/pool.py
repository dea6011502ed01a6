"""Runs a reward in worker processes, so that a hang, a crash or an exception costs one completion, not the run.

    safe = isolated(math_answer_reward, timeout_s=10.0)
    safe(completions=["#### 4", "#### 5"], answer=["4", "4"])  ->  [1.0, 0.0]

By default each completion is scored independently: a free worker calls the reward with lists of length one, and the
scores come back in order. A reward that compares completions, or that remembers earlier ones, needs `batched=True`: a
single worker gets whole calls and keeps its state between them. A failure then costs the whole call.

TRL's `log_extra` and `log_metric` work. `trainer_state` is passed on in batched calls, and to a reward with a parameter
of that name. Anything else that a reward changes outside itself stays in its worker.

`GRPOExtTrainer` wraps rewards by itself; `grpo_ext/rollout/reward_workers.py` says which attributes tell it how.

Workers live until `close()`, or until this process ends in any way. They do not import the main module again: a script
that loads a model costs nothing, and the reward may be a function of that script.
"""

import functools
import inspect
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Any, Literal

import cloudpickle
from loky.backend import get_context
from pebble import ProcessExpired, ProcessPool

from rewards.workers.worker import WorkerResult, init_worker, ping, run_reward

RewardFunc = Callable[..., list[float | None]]

# A run stops if more than MIN_FAILURES and more than MAX_FAILURE_RATE of the last FAILURE_WINDOW completions failed.
MIN_FAILURES, MAX_FAILURE_RATE, FAILURE_WINDOW = 5, 0.05, 1000
SHOWN_CHARACTERS = 300  # of a completion, in an error message


@dataclass
class FailureCounts:
    """How many completions were scored so far, and how many of them failed.

    Attributes:
        completions: all of them, including those that failed.
        timeouts: the reward took longer than its timeout.
        crashes: the worker process died.
        errors: the reward raised, or did not return one score per completion.
    """

    completions: int = 0
    timeouts: int = 0
    crashes: int = 0
    errors: int = 0


def isolated(
    reward: RewardFunc,
    *,
    timeout_s: float = 10.0,
    workers: int | None = None,
    on_error: Literal["none", "raise"] = "none",
    batched: bool = False,
) -> "IsolatedReward":
    """Wrap a reward so that it runs in worker processes. The result works with any TRL trainer.

    Args:
        reward: a reward function with TRL's signature, `f(completions, **columns) -> list[float | None]`.
        timeout_s: seconds per completion, above 0, from when a worker starts on it, to within 0.1 s. A batched call
            gets this time for each of its completions. Recommended: ten times what the slowest completion takes.
        workers: number of processes, 1 or more. None (recommended) means one per core of this training process.
        on_error: "none" scores a failed completion None, which excludes it from its group; "raise" raises an error.
        batched: False scores each completion independently; True sends whole calls to one worker.

    Raises:
        ValueError: `timeout_s` or `workers` not above 0, several workers with `batched`, or an unknown `on_error`.
    """
    if timeout_s <= 0 or (workers is not None and workers < 1):
        raise ValueError(f"timeout_s={timeout_s} and workers={workers} must be above 0, for example 10.0 and 2.")
    if batched and workers not in (None, 1):
        raise ValueError(f"workers={workers} with batched=True: whole calls go to one worker. Leave workers out.")
    if on_error not in ("none", "raise"):
        raise ValueError(f"on_error={on_error!r} is unknown. Valid: 'none', 'raise'.")
    return IsolatedReward(reward, timeout_s, 1 if batched else workers or _process_cores(), on_error, batched)


class IsolatedReward:
    """A reward in worker processes; made by `isolated`.

    Attributes:
        failures: counts since the start. Each call logs its own as `rewards/NAME/timeouts|crashes|errors`.
    """

    runs_in_process = True

    def __init__(self, reward: RewardFunc, timeout_s: float, workers: int, on_error: str, batched: bool):
        self.__name__ = callable_name(reward)  # TRL logs the reward under this name
        self.__wrapped__ = reward  # gives this object the signature of the reward in `inspect`
        self.failures = FailureCounts()
        self._reward, self._timeout_s, self._on_error = reward, timeout_s, on_error
        self._workers, self._batched = workers, batched
        self._takes_trainer_state = batched or "trainer_state" in inspect.signature(reward).parameters
        self._recent_failures: deque[bool] = deque(maxlen=FAILURE_WINDOW)
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._stop: Callable[[], object] = lambda: None

    def __call__(self, *, completions: list[Any], **columns: Any) -> list[float | None]:
        """Score each completion; None if the reward returned None or failed on it.

        Args:
            completions: strings or chat completions.
            columns: the other arguments from TRL. Lists as long as `completions` are split with them.

        Raises:
            RuntimeError: a failure with `on_error="raise"`; failures on more than five, and more than 5%, of the last
                1,000 completions; or no worker could be started.
        """
        log_extra, log_metric = columns.pop("log_extra", None), columns.pop("log_metric", None)
        state = columns.pop("trainer_state", None)
        constant = {"trainer_state": state} if self._takes_trainer_state and state is not None else {}
        size = len(completions) if self._batched else 1
        tasks = [slice(start, start + size) for start in range(0, len(completions), size)]
        pool, before = self._ensure_pool(), FailureCounts(**vars(self.failures))
        futures = [
            pool.schedule(
                run_reward,
                args=(_slice_columns({"completions": completions} | columns, task) | constant, log_extra is not None),
                timeout=self._timeout_s * size,
            )
            for task in tasks
        ]
        results = [self._collect(future, completions[task]) for future, task in zip(futures, tasks, strict=True)]
        for column in dict.fromkeys(column for result in results for column in result.extra):
            log_extra(column, [v for result in results for v in result.extra.get(column, [None] * len(result.scores))])
        if log_metric is not None:
            for name, value in (pair for result in results for pair in result.metrics):
                log_metric(name, value)
            for kind in ("timeouts", "crashes", "errors"):
                count = getattr(self.failures, kind) - getattr(before, kind)
                log_metric(f"rewards/{self.__name__}/{kind}", float(count))
        return [score for result in results for score in result.scores]

    def try_out(self, **arguments: Any) -> list[float | None]:
        """Call the reward once to check that it works: the first failure raises, and nothing is counted."""
        saved = self._on_error, self.failures, self._recent_failures
        self._on_error, self.failures, self._recent_failures = "raise", FailureCounts(), deque()
        try:
            return self(**arguments)
        finally:
            self._on_error, self.failures, self._recent_failures = saved

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        with self._lock:
            self._pool = None
            self._stop()

    def _ensure_pool(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                setup = cloudpickle.dumps(self._reward), os.getpid()
                pool = ProcessPool(self._workers, initializer=init_worker, initargs=setup, context=get_context("loky"))
                started: Future[None] = Future()
                ended = threading.Event()
                # Linux sends a worker its parent-death signal when the thread that started it ends. This one stays.
                threading.Thread(target=_start_workers, args=(pool, started, ended), daemon=True).start()
                try:
                    started.result()
                except Exception as error:
                    raise RuntimeError(f"Reward {self.__name__!r} cannot be set up in a worker: {error!r}") from error
                self._pool = pool
                self._stop = weakref.finalize(self, _stop_workers, pool, ended)  # also runs when this process ends
            return self._pool

    def _collect(self, future: Future[WorkerResult], completions: list[Any]) -> WorkerResult:
        count = len(completions)
        self.failures.completions += count
        try:
            result = future.result()
        except TimeoutError:
            self.failures.timeouts += count
            return self._record_failure(completions, f"took longer than {self._timeout_s * count:g} s")
        except ProcessExpired as error:
            self.failures.crashes += count
            return self._record_failure(completions, f"ended its process with exit code {error.exitcode}")
        except Exception as error:
            self.failures.errors += count
            return self._record_failure(completions, f"raised {error!r}")
        self._recent_failures.extend([False] * count)
        return result

    def _record_failure(self, completions: list[Any], how: str) -> WorkerResult:
        """Scores of None for these completions; raises if `on_error` says so or too many have failed lately."""
        self._recent_failures.extend([True] * len(completions))
        failed, recent = sum(self._recent_failures), len(self._recent_failures)
        shown = repr(str(completions[0])[:SHOWN_CHARACTERS])
        what, advice = f"Reward {self.__name__!r} {how} on the completion {shown}", ""
        if len(completions) > 1:
            what = f"Reward {self.__name__!r} {how} on {len(completions)} completions, the first being {shown}"
            advice = " If it judges each answer by itself, say so by scores_independently = True: "
            advice += "then only one of them is lost."
        if self._on_error == "raise":
            raise RuntimeError(f"{what}. Mend the reward, or pass on_error='none' to leave such answers out.{advice}")
        if failed > max(MIN_FAILURES, MAX_FAILURE_RATE * recent):
            raise RuntimeError(
                f"{what}, and so or similarly on {failed} of the last {recent} answers. A run would learn from noise: "
                f"mend the reward, or raise timeout_s={self._timeout_s:g} if it is only slow.{advice}"
            )
        return WorkerResult([None] * len(completions))


def callable_name(reward: Callable[..., Any]) -> str:
    """The name under which TRL logs a callable: that of the function inside a `functools.partial`, or of the class."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _start_workers(pool: ProcessPool, started: "Future[None]", ended: threading.Event) -> None:
    try:
        started.set_result(pool.schedule(ping).result())
    except Exception as error:
        started.set_exception(error)
    else:
        ended.wait()


def _stop_workers(pool: ProcessPool, ended: threading.Event) -> None:
    pool.stop()
    pool.join()
    ended.set()


def _slice_columns(columns: dict[str, Any], rows: slice) -> dict[str, Any]:
    """These rows of each column; values that are no column are passed whole."""
    count = len(columns["completions"])
    return {
        name: values[rows] if isinstance(values, list) and len(values) == count else values
        for name, values in columns.items()
    }


def _process_cores() -> int:
    """The cores of this training process: an equal share if several run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
