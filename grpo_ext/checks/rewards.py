"""Check the rewards before a run: the columns and arguments that they need, and one call of each on rows of the data.

Without these checks, a reward that needs a missing column would fail only after the first rollout.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

from grpo_ext.checks.prompts import columns_of, values_of
from rewards import MathAnswerReward, check_gold
from rewards.workers.pool import IsolatedReward

# What TRL passes to a reward by name, in addition to the columns of the data.
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
        name, parameters = get_callable_name(reward), inspect.signature(reward).parameters
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
                f"Reward {name!r} takes ({taken}) only, and TRL gives every column and more by name. Let it take the "
                f"rest as well: def {name}({taken}, **columns)."
            )


def check_golds(reward_funcs: Sequence[Any], data: Dataset) -> None:
    """Check that a reward that parses mathematics can parse the gold answers.

    Raises:
        ValueError: it cannot parse some; the message gives their rows.
    """
    if "answer" in columns_of(data) and any(
        isinstance(inspect.unwrap(reward), MathAnswerReward) for reward in filter(callable, reward_funcs)
    ):
        check_gold(values_of(data, "answer"))


def call_once(reward_funcs: Sequence[Any], rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Call each reward on these rows of the data with a dummy completion.

    Args:
        reward_funcs: as TRL takes them; reward models are skipped.
        rows: at least one, each with a `prompt`.

    Returns:
        Scores by the name of the reward.

    Raises:
        ValueError: a reward raises, or does not return a number or None per row.
    """
    prompts = [row["prompt"] for row in rows]
    completions: list[Any] = [
        EXAMPLE_COMPLETION if isinstance(prompt, str) else [{"role": "assistant", "content": EXAMPLE_COMPLETION}]
        for prompt in prompts
    ]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name not in WITHHELD_COLUMNS}
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": [[0] for _ in rows]}
    columns |= {"trainer_state": TrainerState(), "log_extra": _ignore, "log_metric": _ignore}
    scores = {}
    for reward in filter(_is_function, reward_funcs):
        name = get_callable_name(reward)
        try:
            returned = _call(reward, columns)
        except Exception as error:  # a reward may raise anything
            where = f"the first {len(rows)} rows of the data" if len(rows) > 1 else "the first row of the data"
            raise ValueError(
                f"Reward {name!r} raised {error!r} on {where}, answered by {EXAMPLE_COMPLETION!r}."
            ) from error
        if not isinstance(returned, list | tuple) or len(returned) != len(rows):
            raise ValueError(
                f"Reward {name!r} returned {returned!r} for {len(rows)} completions; a list of {len(rows)}."
            )
        for score in returned:
            if score is not None and not _is_number(score):
                raise ValueError(f"Reward {name!r} returned {score!r} for a completion; valid: a number, or None.")
        scores[name] = [None if score is None else float(score) for score in returned]
    return scores


def _call(reward: Callable[..., Any], columns: dict[str, Any]) -> Any:
    if is_async_callable(reward):
        return asyncio.run(reward(**columns))
    return reward.try_out(**columns) if isinstance(reward, IsolatedReward) else reward(**columns)


def _is_function(reward: Any) -> bool:
    return callable(reward) and not isinstance(reward, nn.Module)


def _is_number(score: Any) -> bool:
    try:
        float(score)
    except (TypeError, ValueError):
        return False
    return not isinstance(score, str)


def _ignore(*args: object) -> None:
    """Takes the place of TRL's logging callbacks."""
