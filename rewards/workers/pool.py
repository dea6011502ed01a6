"""Runs a reward in worker processes, where a hang costs one answer, a crash one worker, and an exception one answer.

    safe = isolated(math_answer_reward, timeout_s=10.0)
    safe(completions=["#### 4", "#### 5"], answer=["4", "4"])  ->  [1.0, 0.0]

Each answer is judged by itself: the reward is called with lists of length one, in whatever worker is free, and the
scores come back in order. A reward that compares answers with each other, or that remembers earlier ones, is given
whole calls instead (`together=True`), in one worker that keeps what it remembers; then a failure costs the call.
`log_extra` and `log_metric`, which TRL gives to rewards, work; `trainer_state` is there where it is a parameter of the
reward by name, and in whole calls. Nothing that a reward changes outside itself reaches the process of the training.

`GRPOExtTrainer` does this by itself: see `grpo_ext/rollout/reward_workers.py`.

Workers last until `close`, or until this process ends, however it ends. They do not import the main module again, so a
script that loads a model costs nothing, and the reward may be a function of that script.
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

from rewards.workers.worker import Judged, begin, judge, nothing

Reward = Callable[..., list[float | None]]

# A run stops where more than this share of the last answers could not be judged, and more than a few.
MOST_FAILURES, FEW, LAST_ANSWERS = 0.05, 5, 1000
SHOWN_CHARACTERS = 300  # of a completion, in an error


@dataclass
class Failures:
    """What became of the answers that were judged so far.

    Attributes:
        answers: all of them.
        timeouts: over the deadline.
        crashes: the worker died.
        errors: the reward raised, or did not return one score.
    """

    answers: int = 0
    timeouts: int = 0
    crashes: int = 0
    errors: int = 0


def isolated(
    reward: Reward,
    *,
    timeout_s: float = 10.0,
    workers: int | None = None,
    on_error: Literal["none", "raise"] = "none",
    together: bool = False,
) -> "IsolatedReward":
    """The same reward in worker processes, for any TRL trainer.

    Args:
        reward: TRL's signature, `f(completions, **columns) -> list[float | None]`.
        timeout_s: seconds for one answer, from when a worker takes it up; told to a tenth of a second. A whole call has
            that for each of its answers. Recommended: ten times what the slowest answer takes.
        workers: processes, 1 or more; None, which is recommended, for as many as this training process has cores.
        on_error: what an answer earns that could not be judged: "none", which leaves it out of its group, or "raise" to
            stop at the first.
        together: False, each answer by itself; True, whole calls in one worker.

    Raises:
        ValueError: a timeout or a number of workers that is not above 0, several workers for whole calls, or another
            `on_error`.
    """
    if timeout_s <= 0 or (workers is not None and workers < 1):
        raise ValueError(f"timeout_s={timeout_s} and workers={workers} must be above 0, for example 10.0 and 2.")
    if together and workers not in (None, 1):
        raise ValueError(f"workers={workers} with together=True: whole calls go to one worker. Leave workers out.")
    if on_error not in ("none", "raise"):
        raise ValueError(f"on_error={on_error!r} is unknown. Valid: 'none', 'raise'.")
    return IsolatedReward(reward, timeout_s, 1 if together else workers or _cores(), on_error, together)


class IsolatedReward:
    """What `isolated` returns.

    Attributes:
        failures: counts since the start. Where TRL gives `log_metric`, those of each call go there, as
            `rewards/NAME/timeouts|crashes|errors`.
    """

    needs_no_worker = True

    def __init__(self, reward: Reward, timeout_s: float, workers: int, on_error: str, together: bool):
        self.__name__ = name_of(reward)  # under which TRL logs it
        self.__wrapped__ = reward  # whose signature this one has, for `inspect`
        self.failures = Failures()
        self._reward, self._timeout_s, self._on_error = reward, timeout_s, on_error
        self._workers, self._together = workers, together
        self._wants_state = together or "trainer_state" in inspect.signature(reward).parameters
        self._has_failed: deque[bool] = deque(maxlen=LAST_ANSWERS)
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._stop: Callable[[], object] = lambda: None

    def __call__(self, *, completions: list[Any], **columns: Any) -> list[float | None]:
        """Score each completion; None where it could not be judged.

        Raises:
            RuntimeError: an answer could not be judged and `on_error` is "raise"; or more than 5% of the last 1,000
                could not, and more than five.
        """
        log_extra, log_metric = columns.pop("log_extra", None), columns.pop("log_metric", None)
        state = columns.pop("trainer_state", None)
        constant = {"trainer_state": state} if self._wants_state and state is not None else {}
        size = len(completions) if self._together else 1
        parts = [slice(start, start + size) for start in range(0, len(completions), size)]
        pool, before = self._started(), Failures(**vars(self.failures))
        futures = [
            pool.schedule(
                judge,
                args=(_rows({"completions": completions} | columns, part) | constant, log_extra is not None),
                timeout=self._timeout_s * size,
            )
            for part in parts
        ]
        judged = [self._wait(future, completions[part]) for future, part in zip(futures, parts, strict=True)]
        for column in dict.fromkeys(column for part in judged for column in part.extra):
            log_extra(column, [v for part in judged for v in part.extra.get(column, [None] * len(part.scores))])
        if log_metric is not None:
            for name, value in (pair for part in judged for pair in part.metrics):
                log_metric(name, value)
            for kind in ("timeouts", "crashes", "errors"):
                count = getattr(self.failures, kind) - getattr(before, kind)
                log_metric(f"rewards/{self.__name__}/{kind}", float(count))
        return [score for part in judged for score in part.scores]

    def try_out(self, **arguments: Any) -> list[float | None]:
        """As a call, but the first failure raises and nothing is counted: is the reward set up as it should be?"""
        kept = self._on_error, self.failures, self._has_failed
        self._on_error, self.failures, self._has_failed = "raise", Failures(), deque()
        try:
            return self(**arguments)
        finally:
            self._on_error, self.failures, self._has_failed = kept

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        with self._lock:
            self._pool = None
            self._stop()

    def _started(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                setup = cloudpickle.dumps(self._reward), os.getpid()
                pool = ProcessPool(self._workers, initializer=begin, initargs=setup, context=get_context("loky"))
                started: Future[None] = Future()
                ended = threading.Event()
                # Linux tells workers that their parent died when the thread ends that started them: this one stays.
                threading.Thread(target=_start, args=(pool, started, ended), daemon=True).start()
                try:
                    started.result()
                except Exception as error:
                    raise RuntimeError(f"Reward {self.__name__!r} cannot be set up in a worker: {error!r}") from error
                self._pool = pool
                self._stop = weakref.finalize(self, _end, pool, ended)  # at the latest when this process ends
            return self._pool

    def _wait(self, future: Future[Judged], completions: list[Any]) -> Judged:
        answers = len(completions)
        self.failures.answers += answers
        try:
            judged = future.result()
        except TimeoutError:
            self.failures.timeouts += answers
            return self._failed(completions, f"took longer than {self._timeout_s * answers:g} s")
        except ProcessExpired as error:
            self.failures.crashes += answers
            return self._failed(completions, f"ended its process with exit code {error.exitcode}")
        except Exception as error:
            self.failures.errors += answers
            return self._failed(completions, f"raised {error!r}")
        self._has_failed.extend([False] * answers)
        return judged

    def _failed(self, completions: list[Any], how: str) -> Judged:
        self._has_failed.extend([True] * len(completions))
        failed, judged = sum(self._has_failed), len(self._has_failed)
        shown = repr(str(completions[0])[:SHOWN_CHARACTERS])
        what, alone = f"Reward {self.__name__!r} {how} on the completion {shown}", ""
        if len(completions) > 1:
            what = f"Reward {self.__name__!r} {how} on {len(completions)} completions, the first being {shown}"
            alone = " If it judges each answer by itself, say so by judges_alone = True: then only one of them is lost."
        if self._on_error == "raise":
            raise RuntimeError(f"{what}. Mend the reward, or pass on_error='none' to leave such answers out.{alone}")
        if failed > max(FEW, MOST_FAILURES * judged):
            raise RuntimeError(
                f"{what}, and so or similarly on {failed} of the last {judged} answers. A run would learn from noise: "
                f"mend the reward, or raise timeout_s={self._timeout_s:g} if it is only slow.{alone}"
            )
        return Judged([None] * len(completions))


def name_of(reward: Callable[..., Any]) -> str:
    """What TRL calls a reward: the name of a function, also inside a `functools.partial`, or of the class."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _start(pool: ProcessPool, started: "Future[None]", ended: threading.Event) -> None:
    try:
        started.set_result(pool.schedule(nothing).result())
    except Exception as error:
        started.set_exception(error)
    else:
        ended.wait()


def _end(pool: ProcessPool, ended: threading.Event) -> None:
    pool.stop()
    pool.join()
    ended.set()


def _rows(columns: dict[str, Any], part: slice) -> dict[str, Any]:
    """The columns of some answers; what is no column is passed as it is."""
    answers = len(columns["completions"])
    return {
        name: values[part] if isinstance(values, list) and len(values) == answers else values
        for name, values in columns.items()
    }


def _cores() -> int:
    """Of this training process, where several share the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
