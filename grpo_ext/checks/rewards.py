"""Check the rewards before a run: the columns and arguments that they need, and a call of those that can be tried.

Without these checks, a reward that needs a missing column would fail only after the first rollout.

Columns and arguments are checked without a call. Only rewards that declare `scores_independently = True` are called:
the score of a completion depends on its row alone, and a call has no side effects. Any other reward may count its
calls, keep its arguments or use a paid service, so it is called by TRL only.
"""

import asyncio
import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

from grpo_ext.checks.prompts import columns_of, values_of
from grpo_ext.rewards import MathAnswerReward, check_gold
from grpo_ext.rewards.workers.pool import IsolatedReward, declares

# Arguments that TRL passes to a reward by name, in addition to the columns of the data.
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
WITHHELD_COLUMNS = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on
EXAMPLE_COMPLETION = "A first answer, to see what the reward returns."


def check_signatures(reward_funcs: Sequence[Any], columns: Sequence[str]) -> None:
    """Check that TRL can call each reward with these columns.

    Raises:
        ValueError: a reward needs a column that the data lacks, or does not accept all arguments that TRL passes.
    """
    known = {*TRL_ARGUMENTS, *columns} - {"prompt", "completion"}
    for reward in filter(_is_function, reward_funcs):
        name, parameters = get_callable_name(reward), _parameters(reward)
        if parameters is None:
            continue
        kinds = [parameter.kind for parameter in parameters.values()]
        for parameter in parameters.values():
            is_needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if is_needed and parameter.name not in known:
                raise ValueError(
                    f"Reward {name!r} needs column {parameter.name!r}; the dataset has: {', '.join(columns)}."
                )
        if inspect.Parameter.VAR_KEYWORD not in kinds and not known - {"environments"} <= set(parameters):
            taken = ", ".join(parameters)
            raise ValueError(
                f"Reward {name!r} accepts only ({taken}), but TRL passes every column and more by name. Let it accept "
                f"the rest as well: def {name}({taken}, **columns)."
            )


def check_golds(reward_funcs: Sequence[Any], data: Dataset) -> list[str]:
    """Check that a reward that parses mathematics can parse the gold answers.

    Returns:
        A warning if some gold answers are compared only as text.

    Raises:
        ValueError: some cannot be parsed; the message gives their rows.
    """
    if "answer" not in columns_of(data) or not any(
        isinstance(inspect.unwrap(reward), MathAnswerReward) for reward in filter(callable, reward_funcs)
    ):
        return []
    answers = values_of(data, "answer")
    rows = check_gold(answers)
    if not rows:
        return []
    return [
        f"{len(rows)} of {len(answers)} gold answers cannot be parsed and are compared as text, so that only the same "
        f"notation is right: row {rows[0]}: {str(answers[rows[0]])[:60]!r}{', ...' if len(rows) > 1 else ''}"
    ]


def call_once(
    reward_funcs: Sequence[Any],
    row: dict[str, Any],
    *,
    completions: int,
    completion_ids: list[int],
    state: TrainerState,
) -> dict[str, list[float | None]]:
    """Call each reward that can be tried as TRL would: with a whole group of completions of one prompt.

    Args:
        reward_funcs: the reward functions, as passed to TRL.
        row: a row of the data with a `prompt` and the columns that TRL passes on.
        completions: number of completions, 1 or more; all are `EXAMPLE_COMPLETION`.
        completion_ids: the token ids of `EXAMPLE_COMPLETION`.
        state: state of the run; each reward gets a copy of it.

    Returns:
        Name of the reward -> its scores.

    Raises:
        ValueError: a reward raises, or does not return one number or None per completion.
    """
    prompt = row["prompt"]
    completion: Any = EXAMPLE_COMPLETION
    if not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": EXAMPLE_COMPLETION}]
    columns = {name: value for name, value in row.items() if name not in WITHHELD_COLUMNS}
    columns |= {"prompts": prompt, "completions": completion, "completion_ids": completion_ids}
    scores = {}
    for reward in filter(_can_be_tried, reward_funcs):
        name = get_callable_name(reward)
        arguments: dict[str, Any] = {
            column: [copy.deepcopy(value) for _ in range(completions)] for column, value in columns.items()
        }
        arguments |= {"trainer_state": copy.deepcopy(state), "log_extra": _ignore, "log_metric": _ignore}
        try:
            with _keeping_random_state():
                returned = list(_call(reward, arguments))
        except Exception as error:  # a reward may raise anything
            what = str(error) if isinstance(reward, IsolatedReward) else f"Reward {name!r} raised {error!r}."
            raise ValueError(
                f"{what} It was tried on the first row of the data, with {completions} completions "
                f"{EXAMPLE_COMPLETION!r}."
            ) from error
        if len(returned) != completions:
            raise ValueError(
                f"Reward {name!r} returned {returned!r} for {completions} completions; valid: one score per completion."
            )
        for score in returned:
            if score is not None and not _is_number(score):
                raise ValueError(f"Reward {name!r} returned {score!r} for a completion; valid: a number, or None.")
        scores[name] = [None if score is None else float(score) for score in returned]
    return scores


def _can_be_tried(reward: Any) -> bool:
    return _is_function(reward) and declares(reward, "scores_independently")


def _call(reward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if is_async_callable(reward):
        return asyncio.run(reward(**arguments))
    return reward.try_out(**arguments) if isinstance(reward, IsolatedReward) else reward(**arguments)


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """A context that restores the random state of Python, numpy and torch at its end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _is_function(reward: Any) -> bool:
    return callable(reward) and not isinstance(reward, nn.Module)


def _parameters(reward: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters that TRL's call binds to: a decorator's own, not those of the function in it; None if unknown."""
    if isinstance(reward, IsolatedReward):
        reward = reward.__wrapped__
    try:
        return inspect.signature(reward, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # written in C
        return None


def _is_number(score: Any) -> bool:
    try:
        float(score)
    except (TypeError, ValueError):
        return False
    return not isinstance(score, str | bytes)


def _ignore(*args: object) -> None:
    """Replaces TRL's logging callbacks."""
