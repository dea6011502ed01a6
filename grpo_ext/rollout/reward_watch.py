"""Watch rewards that are called in the training process, where nothing can end a call that hangs.

An exception of a reward propagates unchanged, with a note that names the reward. A slow call is reported while it
runs:

    Reward 'judge' has been running for 10 s on 8 completions, the first being 'So 12 + 7 = ...'. ...
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger
from torch import nn
from trl.trainer.utils import is_async_callable

from grpo_ext.rewards.workers.pool import SHOWN_CHARACTERS, IsolatedReward, declares, slice_columns

logger = get_logger(__name__)

HOW_TO_ISOLATE = (
    "If it may hang, run it in a worker process, which is killed after reward_timeout: reward_funcs=isolated(REWARD), "
    "with `from grpo_ext.rewards import isolated`, or reward_workers=1 for all rewards."
)


class RewardWatch:
    """Watches the rewards of a run.

    Args:
        timeout_s: seconds after which a call is reported, above 0. Each further report of the same reward, in this or a
            later call, needs twice the time of the last report.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._reported: dict[str, float] = {}  # seconds, by the name of the reward

    def watched(self, reward_funcs: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The same rewards, watched; reward models and isolated rewards are returned unchanged."""
        return [self._watched(reward, name) for reward, name in zip(reward_funcs, names, strict=True)]

    def _watched(self, reward: Any, name: str) -> Any:
        if not callable(reward) or isinstance(reward, nn.Module | IsolatedReward):
            return reward
        bounds_its_time = declares(reward, "runs_in_process")

        def call(**arguments: Any) -> Any:
            with _naming(reward, name, arguments), self._timing(name, arguments, is_off=bounds_its_time):
                returned = reward(**arguments)
                # An iterator computes its items only when they are read.
                return list(returned) if isinstance(returned, Iterator) else returned

        async def call_async(**arguments: Any) -> Any:
            with _naming(reward, name, arguments), self._timing(name, arguments, is_off=bounds_its_time):
                return await reward(**arguments)

        return call_async if is_async_callable(reward) else call

    @contextmanager
    def _timing(self, name: str, arguments: dict[str, Any], *, is_off: bool) -> Iterator[None]:
        if is_off:
            yield
            return
        is_over = threading.Event()
        thread = threading.Thread(target=self._report, args=(name, arguments["completions"], is_over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _report(self, name: str, completions: list[Any], is_over: threading.Event) -> None:
        waited = 0.0
        while True:
            due = max(self._timeout_s, 2 * self._reported.get(name, 0.0))
            if is_over.wait(due - waited):
                return
            waited = self._reported[name] = due
            logger.warning(
                f"Reward {name!r} has been running for {due:g} s on {_shown(completions)}. {HOW_TO_ISOLATE}",
                main_process_only=False,
            )


@contextmanager
def _naming(reward: Callable[..., Any], name: str, arguments: dict[str, Any]) -> Iterator[None]:
    """A context that adds a note to an exception: the name of the reward, and the row if it can be determined."""
    try:
        yield
    except Exception as error:
        completions = arguments["completions"]
        row = _failing_row(reward, arguments) if declares(reward, "scores_independently") else None
        where = _shown(completions) if row is None else f"row {row}, the completion {_text(completions[row])}"
        error.add_note(f"Reward {name!r} raised this on {where}.")
        raise


def _failing_row(reward: Callable[..., Any], arguments: dict[str, Any]) -> int | None:
    """The first row on which the reward raises if called with that row alone; the reward must score independently."""
    if inspect.iscoroutinefunction(reward):
        return None
    quiet = arguments | {"log_extra": _ignore, "log_metric": _ignore}
    for row in range(len(arguments["completions"])):
        try:
            list(reward(**slice_columns(quiet, slice(row, row + 1))))
        except Exception:
            return row
    return None


def _shown(completions: list[Any]) -> str:
    return f"{len(completions)} completions, the first being {_text(completions[0])}"


def _text(completion: Any) -> str:
    return repr(str(completion)[:SHOWN_CHARACTERS])


def _ignore(*args: object) -> None:
    """Replaces TRL's logging callbacks."""
