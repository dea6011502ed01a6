"""Rewards are called as stock TRL calls them: same process, thread, calls and arguments, so the same rewards.

Each case is a kind of reward that people write, and that would silently break in a copy of the program.
"""

import functools
import logging
import multiprocessing
import random
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.training import COMMON, log_of
from tests.tools.waiting import becomes

SETTINGS = COMMON | {"num_iterations": 1, "max_steps": 3}
COLUMNS = {"answer": ["a", "b", "c", "d"], "level": [1, 2, 3, 4]}


def lengths(completions):
    return [float(len(set(text))) for text in completions]


def by_callback():
    """A schedule: callback and reward are the same object, and the reward also reads a dict."""
    config = {"stage": 0}

    class Schedule(TrainerCallback):
        stage = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.stage = 5

        def on_step_end(self, args, state, control, **kwargs):
            self.stage += 1
            config["stage"] += 1

        def __call__(self, completions, **columns):
            return [length * self.stage + config["stage"] for length in lengths(completions)]

    schedule = Schedule()
    return schedule, [schedule], lambda trainer: None


def by_closure():
    """A weight that halves with every call, and a list that grows."""
    weight, seen = 1.0, []

    def anneal(completions, **columns):
        nonlocal weight
        weight *= 0.5
        seen.extend(completions)
        return [weight * length + len(seen) for length in lengths(completions)]

    return anneal, [], lambda trainer: None


def by_trainer():
    """A reward that gets its trainer later, and reads the trainer's step and model."""

    class Judge:
        trainer = None

        def score(self, completions, **columns):
            assert isinstance(self.trainer.model, torch.nn.Module)
            return [length + self.trainer.state.global_step for length in lengths(completions)]

    judge = Judge()
    return judge.score, [], lambda trainer: setattr(judge, "trainer", trainer)


def by_progress():
    def warm_up(completions, trainer_state, **columns):
        share = trainer_state.global_step / trainer_state.max_steps
        return [share * length for length in lengths(completions)]

    return warm_up, [], lambda trainer: None


def by_group():
    """The best of each group."""

    def best(prompts, completions, **columns):
        groups = np.array(lengths(completions)).reshape(-1, 4)
        assert all(len(set(prompts[start : start + 4])) == 1 for start in range(0, len(prompts), 4))
        return (groups == groups.max(axis=1, keepdims=True)).astype(float).reshape(-1)

    return best, [], lambda trainer: None


def by_own_seed():
    numbers = random.Random(3)

    def noisy(completions, **columns):
        return [length + numbers.random() for length in lengths(completions)]

    return noisy, [], lambda trainer: None


def by_processes():
    def checked(completions, **columns):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        process = context.Process(target=lambda: results.put(lengths(completions)))
        process.start()
        process.join()
        return results.get()

    return checked, [], lambda trainer: None


def by_decorator():
    def plain(completions):
        return lengths(completions)

    @functools.wraps(plain)
    def adapted(**columns):
        return plain(columns["completions"])

    return adapted, [], lambda trainer: None


def by_coroutine():
    async def asked(completions, **columns):
        return lengths(completions)

    return asked, [], lambda trainer: None


def returning(convert):
    def make():
        def reward(completions, **columns):
            return convert(lengths(completions))

        return reward, [], lambda trainer: None

    return make


KINDS = {
    "schedule of a callback": by_callback,
    "closure that anneals": by_closure,
    "reward that knows its trainer": by_trainer,
    "share of the run": by_progress,
    "whole groups": by_group,
    "numbers from its own seed": by_own_seed,
    "processes": by_processes,
    "decorator": by_decorator,
    "coroutine": by_coroutine,
    "tuple": returning(tuple),
    "array": returning(np.array),
    "tensor": returning(torch.tensor),
    "series": returning(lambda scores: pd.Series(scores, index=range(10, 10 + len(scores)))),
    "generator": returning(lambda scores: (score for score in scores)),
    "None": returning(lambda scores: [None, *scores[1:]]),
}


def recorded(reward, calls):
    """The reward, which also records in `calls` the arguments, step and thread of each call."""

    def record(arguments):
        given = {name: value for name, value in arguments.items() if isinstance(value, list)}
        state = arguments["trainer_state"]
        calls.append((set(arguments), given, (state.global_step, state.max_steps), threading.current_thread().name))

    if "asked" in getattr(reward, "__name__", ""):

        async def call_async(**arguments):
            record(arguments)
            return await reward(**arguments)

        return call_async

    def call(**arguments):
        record(arguments)
        return reward(**arguments)

    return call


@pytest.mark.parametrize("kind", thinned(KINDS, ["share of the run", "tuple", "array"]))
def test_the_same_calls_and_rewards(build, tokenizer, kind):
    """With every check that runs before the first step: none may call the reward or change what it sees."""
    runs = []
    for trainer_class in (GRPOTrainer, GRPOExtTrainer):
        reward, callbacks, attach = KINDS[kind]()
        calls = []
        ours = {"guards": True, "reward_workers": None} if trainer_class is GRPOExtTrainer else {}
        trainer = build(
            small_llama(tokenizer),
            trainer=trainer_class,
            reward=recorded(reward, calls),
            peft_config=random_lora(init_lora_weights=True),
            columns=COLUMNS,
            arguments={"callbacks": callbacks},
            **SETTINGS | ours,
        )
        attach(trainer)
        trainer.train()
        runs.append((calls, log_of(trainer, "reward"), list(trainer._logs["advantages"])))
    (stock_calls, stock_rewards, stock_advantages), (calls, rewards, advantages) = runs
    assert len(calls) == len(stock_calls) == 3
    assert calls == stock_calls
    assert rewards == stock_rewards
    assert advantages == pytest.approx(stock_advantages, abs=1e-5)


def test_the_trainer_holds_the_rewards_that_it_was_given(build, small_model):
    """Scripts look them up, and TRL modifies the given list in place."""
    given = [by_closure()[0], by_own_seed()[0]]
    trainer = build(small_model, reward=given, peft_config=random_lora(), reward_workers=None)
    trainer.train()
    assert trainer.reward_funcs is given


# A reward that fails


def raises(completions, **columns):
    raise LookupError("no such answer")


def raises_lazily(completions, **columns):
    for text in completions:
        yield float(len(text))
    raise LookupError("no such answer")


async def raises_elsewhere(completions, **columns):
    raise LookupError("no such answer")


@pytest.mark.parametrize("reward", [raises, raises_lazily, raises_elsewhere])
def test_an_exception_keeps_its_type_and_names_the_reward(build, small_model, reward):
    trainer = build(small_model, reward=reward, peft_config=random_lora(), reward_workers=None)
    with pytest.raises(LookupError, match="no such answer") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.startswith(f"Reward '{reward.__name__}' raised this on 8 completions, the first being ")


def test_an_exception_names_the_row(build, small_model):
    """A reward that scores rows independently is called again row by row to find it."""
    seen = []

    def picky(completions, **columns):
        seen.append(list(completions))
        return [1.0 / (text != seen[0][5]) for text in completions]

    picky.scores_independently = True
    trainer = build(small_model, reward=picky, peft_config=random_lora(), reward_workers=0)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train()
    assert caught.value.__notes__ == [f"Reward 'picky' raised this on row 5, the completion {seen[0][5]!r}."]


# A reward that takes long


def test_a_slow_call_is_reported_while_it_runs(build, small_model, caplog):
    """A judge that hangs must not look like a run that hangs. A judge that is always slow must not fill the log: it is
    reported again only if it takes twice as long."""
    calls = []

    def slow(completions, **columns):
        wanted = [2, 2, 3][len(calls)]  # reports in total before this call returns
        calls.append(wanted)
        assert becomes(lambda: len(reported()) >= wanted)
        time.sleep(0.1)
        return lengths(completions)

    def reported():
        return [record for record in caplog.records if "'slow' has been running for" in record.getMessage()]

    trainer = build(small_model, reward=slow, peft_config=random_lora(), reward_timeout=0.25, max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    reports = [record.getMessage() for record in reported()]
    assert len(reports) == 3
    for report, seconds in zip(reports, ("0.25", "0.5", "1"), strict=True):
        assert f"has been running for {seconds} s on 8 completions, the first being " in report
        assert "reward_funcs=isolated(REWARD)" in report


def test_quick_calls_are_not_reported(build, small_model, caplog):
    build(small_model, reward=by_closure()[0], peft_config=random_lora()).train()
    assert "has been running" not in caplog.text
