"""Runs a reward in worker processes, so that a hang or a crash costs one completion or one call, not the run.

    safe = isolated(math_answer_reward, timeout_s=10.0)
    safe(completions=["#### 4", "#### 5"], answer=["4", "4"])  ->  [1.0, 0.0]

A reward that declares `scores_independently = True` gets one completion at a time, in several workers, and a failure
costs one completion. Any other reward gets whole calls, in a dedicated worker that keeps the reward's state between
calls: it may compare completions and remember earlier ones. A failure then costs the whole call.

Differences from a call in the training process:

- At the first call, the worker gets a copy of the reward and of everything that it refers to. Later changes in the
  training process do not reach the worker, and objects that the reward changes are changed only in the worker. A
  replaced worker starts from that copy again, and a resumed run from a new one.
- `trainer_state` has the fields of transformers' `TrainerState`, without `log_history`.
- For each task, `random` is reseeded from the seed of the run, the step and the row, and so are numpy and torch if the
  reward has imported them by then. A repeated or resumed run therefore draws the same numbers.
- The working directory is that of the training process. What a reward prints appears in its terminal, and log records
  go to its loggers. TRL's `log_extra` and `log_metric` work.
"""

import dataclasses
import functools
import inspect
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cloudpickle

from grpo_ext.rewards.cores import cores_per_process
from grpo_ext.rewards.workers.processes import SetupError, WorkerPool, shared_pool
from grpo_ext.rewards.workers.worker import Failure, RunState, Task, WorkerResult

logger = logging.getLogger(__name__)

RewardFunc = Callable[..., Any]

# A run stops if more than MIN_FAILURES and more than MAX_FAILURE_RATE of the last FAILURE_WINDOW tasks failed: of its
# completions, or of its calls if the reward gets whole calls.
MIN_FAILURES, MAX_FAILURE_RATE, FAILURE_WINDOW = 5, 0.05, 1000
SHOWN_CHARACTERS = 300  # of a completion, in an error message
MAX_DEFAULT_WORKERS = 4  # each has the modules of the rewards in memory

_keys = itertools.count()


@dataclass
class FailureCounts:
    """How many completions have been scored so far, and how many of them failed.

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
    batched: bool | None = None,
    seed: int | None = None,
) -> "IsolatedReward":
    """Wrap a reward so that it runs in worker processes. The result works with any TRL trainer.

    Args:
        reward: a reward function with TRL's signature, `f(completions, **columns)`, that returns one number or None per
            completion. It is sent to its workers by cloudpickle at the first call.
        timeout_s: seconds per completion, above 0, measured from the call of the reward and enforced to within 0.2 s. A
            whole call gets this time for each of its completions. Recommended: ten times what the slowest one takes.
        workers: number of processes that score completions one by one, 1 or more; rewards with the same number share
            them. None (recommended) means one per core of this training process, at most 4, for a reward with
            `scores_independently = True`, and otherwise one worker that gets whole calls.
        on_error: "none" scores a failed completion None, which excludes it from its group; "raise" raises an error.
        batched: True sends whole calls to one worker, False one completion at a time to several. None (recommended)
            means True, unless the reward declares `scores_independently = True` or `workers` is given.
        seed: seed of the random numbers that the reward draws. None (recommended) means the seed of the run with
            GRPOExtTrainer, and 0 with other trainers.

    Raises:
        ValueError: `timeout_s` or `workers` not above 0, `workers` with `batched=True`, an unknown `on_error`, or an
            asynchronous reward.
    """
    if timeout_s <= 0 or (workers is not None and workers < 1):
        raise ValueError(f"timeout_s={timeout_s} and workers={workers} must be above 0, for example 10.0 and 2.")
    if batched and workers not in (None, 1):
        raise ValueError(f"workers={workers} with batched=True: whole calls go to one worker. Leave workers out.")
    if on_error not in ("none", "raise"):
        raise ValueError(f"on_error={on_error!r} is unknown. Valid: 'none', 'raise'.")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        raise ValueError(
            f"Reward {callable_name(reward)!r} is asynchronous: TRL awaits it in the training process. Pass it "
            f"without isolated(...), or isolate a function that runs it with asyncio.run(...)."
        )
    if batched is None:
        batched = workers is None and not declares(reward, "scores_independently")
    return IsolatedReward(reward, timeout_s, None if batched else workers or default_workers(), on_error, seed)


class IsolatedReward:
    """A reward in worker processes, created by `isolated`.

    Attributes:
        failures: counts since the start. Each call logs its own counts as `rewards/NAME/timeouts|crashes|errors`.
        seed: seed of the random numbers that the reward draws; None means 0.
        pool: the workers.
    """

    def __init__(
        self, reward: RewardFunc, timeout_s: float, workers: int | None, on_error: str, seed: int | None = None
    ):
        self.__name__ = callable_name(reward)  # TRL logs the reward under this name
        self.__wrapped__ = reward  # gives this object the signature of the reward in `inspect`
        self.failures = FailureCounts()
        self.seed = seed
        self.pool: WorkerPool = WorkerPool(1) if workers is None else shared_pool(workers)
        self._reward, self._timeout_s, self._on_error = reward, timeout_s, on_error
        self._batched = workers is None
        self._recent_failures: deque[bool] = deque(maxlen=FAILURE_WINDOW)
        self._lock = threading.Lock()
        self._sent: _Sent | None = None

    @property
    def scores_independently(self) -> bool:
        """Whether the reward declares that the score of a completion depends on its row alone."""
        return declares(self._reward, "scores_independently")

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Score each completion; None if the reward returned None or failed on it.

        Args:
            completions: strings or chat completions.
            columns: the other arguments from TRL. Lists as long as `completions` are split with them.

        Raises:
            ValueError: the reward, or an argument, cannot be sent to a worker.
            RuntimeError: a failure with `on_error="raise"`; more than five failures that are more than 5% of the last
                1,000 completions, or of the last 1,000 calls if the reward gets whole calls; or the reward cannot be
                set up in a worker.
        """
        log_extra, log_metric = columns.pop("log_extra", None), columns.pop("log_metric", None)
        state = columns.get("trainer_state")
        if state is not None:
            columns["trainer_state"] = _plain_state(state)
        columns = {"completions": completions} | columns
        size = max(1, len(completions)) if self._batched else 1
        slices = [slice(start, start + size) for start in range(0, len(completions), size)]
        sent, folder = self._send(), str(Path.cwd())
        source = f"{self.seed or 0}/{self.__name__}/{getattr(state, 'global_step', 0)}/{os.environ.get('RANK', '0')}"
        tasks = [
            Task(
                key=sent.key,
                arguments=self._pickled(slice_columns(columns, rows)),
                logs=log_extra is not None,
                seed=f"{source}/{rows.start}",
                folder=folder,
            )
            for rows in slices
        ]
        before = FailureCounts(**vars(self.failures))
        try:
            answers = self.pool.run(tasks, sent.reward, self._timeout_s * size)
        except SetupError as error:
            raise RuntimeError(
                f"Reward {self.__name__!r} cannot be set up in a worker: {error}. Call it in the training process, "
                f"without isolated(...) and reward_workers."
            ) from error
        if self._batched and self.pool.replaced > sent.replaced:
            sent.replaced = self.pool.replaced
            logger.warning(
                f"The worker of reward {self.__name__!r} has ended and was replaced: the state that the reward has "
                f"accumulated since its first call is lost."
            )
        results = [self._collect(answer, completions[rows]) for answer, rows in zip(answers, slices, strict=True)]
        if log_extra is not None:
            self._log_extra(log_extra, results)
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

    def start(self) -> None:
        """Start the workers without waiting for them, instead of at the first call."""
        self.pool.start()

    def close(self) -> None:
        """End the workers. The next call starts new ones, with the reward as it is then."""
        self.pool.close()

    def _send(self) -> "_Sent":
        """The reward as it was at the first call since the workers were started."""
        with self._lock:
            if self._sent is None or self._sent.epoch != self.pool.epoch:
                try:
                    pickled = cloudpickle.dumps(self._reward)
                except Exception as error:  # an object may raise anything when it is pickled
                    raise ValueError(
                        f"Reward {self.__name__!r} cannot be sent to a worker: {error!r}. It refers to an object of "
                        f"the training process, for example the trainer, an open file or a lock. Remove the reference, "
                        f"or call the reward in the training process, without isolated(...) and reward_workers."
                    ) from error
                self._sent = _Sent(next(_keys), pickled, self.pool.epoch, self.pool.replaced)
            return self._sent

    def _pickled(self, arguments: dict[str, Any]) -> bytes:
        try:
            return cloudpickle.dumps(arguments)
        except Exception as error:
            bad = next((name for name, values in arguments.items() if not _can_be_pickled(values)), "?")
            raise ValueError(
                f"Argument {bad!r} of reward {self.__name__!r} cannot be sent to a worker: {error!r}. Remove the "
                f"column, or call the reward in the training process, without isolated(...) and reward_workers."
            ) from error

    def _log_extra(self, log_extra: Callable[[str, list[Any]], None], results: list[WorkerResult]) -> None:
        if self._batched:
            for column, values in (pair for result in results for pair in result.extra):
                log_extra(column, values)
            return
        rows = [dict(result.extra) for result in results]
        for column in dict.fromkeys(column for row in rows for column in row):
            log_extra(column, [value for row in rows for value in row.get(column, [None])])

    def _collect(self, answer: WorkerResult | Failure, completions: list[Any]) -> WorkerResult:
        count = len(completions)
        self.failures.completions += count
        self._recent_failures.append(isinstance(answer, Failure))
        if isinstance(answer, WorkerResult):
            return answer
        setattr(self.failures, answer.kind, getattr(self.failures, answer.kind) + count)
        error = self._check_failure(completions, answer.reason)
        if error is not None:
            if answer.trace:
                error.add_note(f"In the worker:\n{answer.trace}")
            raise error
        return WorkerResult([None] * count)

    def _check_failure(self, completions: list[Any], reason: str) -> RuntimeError | None:
        """The error to raise if `on_error` is "raise" or too many recent tasks failed, else None.

        A failed call is also logged: it may cost all groups of a step.
        """
        failed, recent = sum(self._recent_failures), len(self._recent_failures)
        shown = repr(str(completions[0])[:SHOWN_CHARACTERS])
        what, advice = f"Reward {self.__name__!r} {reason} on the completion {shown}", ""
        if len(completions) > 1:
            what = f"Reward {self.__name__!r} {reason} on {len(completions)} completions, the first being {shown}"
            advice = " If the score of a completion depends on its row alone, set scores_independently = True on it: a "
            advice += "failure then costs only one completion."
        if self._on_error == "raise":
            return RuntimeError(f"{what}. Fix the reward, or pass on_error='none' to exclude such completions.{advice}")
        if failed > max(MIN_FAILURES, MAX_FAILURE_RATE * recent):
            unit = "calls" if self._batched else "completions"
            return RuntimeError(
                f"{what}. It failed on {failed} of the last {recent} {unit}, so the run would learn from noise: "
                f"fix the reward, or increase timeout_s={self._timeout_s:g} if it is just slow.{advice}"
            )
        if self._batched:
            logger.warning(f"{what}. The completions of this call are not scored.{advice}")
        return None


@dataclass
class _Sent:
    """The reward as it was sent to its workers: its key, its pickle, and the state of the pool at that time."""

    key: int
    reward: bytes
    epoch: int
    replaced: int


def callable_name(reward: Callable[..., Any]) -> str:
    """The name under which TRL logs a callable: that of the function inside a `functools.partial`, or of the class."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def declares(reward: Callable[..., Any], name: str) -> bool:
    """Whether a reward, or the function inside a `functools.partial`, sets this attribute to a true value.

    - `scores_independently`: the score of a completion depends on its row alone, and a call has no side effects: rows
      may be scored one by one, in any order, and the reward may be tried before a run.
    - `runs_in_process`: it bounds its own time, so it is never sent to a worker.
    """
    while isinstance(reward, functools.partial):
        reward = reward.func
    return bool(getattr(reward, name, False))


def default_workers() -> int:
    """One worker per core of this training process, at most four; cores are shared if several processes train."""
    return min(MAX_DEFAULT_WORKERS, cores_per_process())


def _plain_state(state: Any) -> RunState:
    """The fields of a `TrainerState` that are plain values: unpickling the state would import transformers."""
    names = [field.name for field in dataclasses.fields(state)] if dataclasses.is_dataclass(state) else vars(state)
    fields = {name: getattr(state, name) for name in names if name != "log_history"}
    return RunState(**{name: value for name, value in fields.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def slice_columns(columns: dict[str, Any], rows: slice) -> dict[str, Any]:
    """These rows of each column; values that are not columns are passed whole."""
    count = len(columns["completions"])
    return {
        name: values[rows] if isinstance(values, list) and len(values) == count else values
        for name, values in columns.items()
    }
