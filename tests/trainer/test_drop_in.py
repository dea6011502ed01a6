"""What a TRL script sees after its two imports are changed: the same as with stock TRL, which runs in the same test.

Each case trains with either class and returns what a user looks at; both must return the same. Tools and environments
are in test_tools.py, options of the loss in test_trl_options.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, LlamaForCausalLM, TrainerCallback
from trl import GRPOTrainer

from grpo_ext import TRL_DEFAULTS, GRPOExtTrainer
from tests.tools.lanes import slow_but
from tests.tools.models import small_llama
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of

# TRL's own objective, at a learning rate at which rewards change.
COMMON = TRL_DEFAULTS | {"learning_rate": 1e-2, "max_steps": 4}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
SAVED = {"save_strategy": "steps", "save_steps": 2}
OUR_METRICS = ("frac_", "growth/", "nonfinite/", "peak_memory", "sampling/", "time/", "advantages/")
Make = Callable[..., Any]


@pytest.fixture
def make_of(build, tokenizer, tmp_path) -> Callable[[type[GRPOTrainer]], Make]:
    """`make_of(GRPOTrainer)(max_steps=3)`: a trainer of this class, with its own model and folder."""
    small_llama(tokenizer).save_pretrained(tmp_path / "base")

    def make(kind: type[GRPOTrainer], **settings: Any) -> Any:
        guards = {"guards": True} if issubclass(kind, GRPOExtTrainer) else {}
        settings = COMMON | guards | {"output_dir": str(tmp_path / kind.__name__)} | settings
        return build(LlamaForCausalLM.from_pretrained(tmp_path / "base"), trainer=kind, **settings)

    return lambda kind: functools.partial(make, kind)


def held_out() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[:2]})


def stock_metrics(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log without times, and without the metrics that our trainer adds."""
    return {
        name: value
        for name, value in row.items()
        if not name.removeprefix("eval_").startswith(OUR_METRICS)
        and not any(part in name for part in ("time", "per_second", "flos"))
    }


def log_rows(trainer: Any) -> list[dict[str, Any]]:
    return [stock_metrics(row) for row in trainer.state.log_history]


class EventRecorder(TrainerCallback):
    """Records every event with its step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)
        return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))


def events_of_callbacks(make: Make) -> Any:
    """Logs, evaluations and checkpoints fall on different steps."""
    recorder = EventRecorder()
    arguments = {"callbacks": [recorder], "eval_dataset": held_out()}
    make(logging_steps=3, save_strategy="steps", save_steps=4, max_steps=5, **EVALUATED, arguments=arguments).train()
    return recorder.events


def log_history(make: Make) -> Any:
    """A script reads the reward from the last row of the log. A checkpoint between two logs must not reset the
    running means that the next log shows."""
    trainer = make(max_steps=5, logging_steps=3, **SAVED)
    trainer.train()
    assert "reward" in trainer.state.log_history[-1]
    return log_rows(trainer)


def evaluations(make: Make) -> Any:
    """Before, during and after training, on several data sets."""
    sets = {"easy": held_out(), "hard": held_out()}
    trainer = make(**EVALUATED, eval_on_start=True, num_generations_eval=2, arguments={"eval_dataset": sets})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate(sets["easy"], metric_key_prefix="test")
    return [stock_metrics(before), stock_metrics(after), log_rows(trainer)]


def best_model(make: Make) -> Any:
    """`load_best_model_at_end` by the reward of the evaluation."""
    trainer = make(
        **EVALUATED | SAVED | {"metric_for_best_model": "eval_reward", "load_best_model_at_end": True},
        arguments={"eval_dataset": held_out(), "callbacks": [EarlyStoppingCallback(2)]},
        max_steps=8,
    )
    trainer.train()
    state = trainer.state
    return [state.best_metric, state.best_global_step, state.global_step, weights_of(trainer)]


def early_stop(make: Make) -> Any:
    """A callback ends the run in its third step."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make(arguments={"callbacks": [Stop()]})
    output = trainer.train()
    return [output.global_step, output.training_loss, log_rows(trainer), weights_of(trainer)]


def resumed_run(make: Make) -> Any:
    """From the last checkpoint to a later step; sampling continues from the saved random state."""
    make(**SAVED).train()
    trainer = make(**SAVED | {"max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    return [trainer.state.global_step, [row["step"] for row in trainer.state.log_history]]


def trained_twice(make: Make) -> Any:
    """A second `train()` begins at step 0 with the weights of the first."""
    trainer = make(max_steps=2)
    trainer.train()
    trainer.train()
    return [log_rows(trainer), weights_of(trainer)]


def streamed_data(make: Make) -> Any:
    """Checks, model cards and saves must not open a stream: each opening downloads it again."""
    openings = []

    def rows():
        openings.append(None)
        yield from ({"prompt": prompt} for prompt in PROMPTS * 3)

    trainer = make(**SAVED, data=IterableDataset.from_generator(rows))
    trainer.train()
    return [len(openings), log_rows(trainer)]


def subclass(make: Make) -> Any:
    """Overrides of rewards, loss and log."""
    trainer = make(max_steps=2)
    kind = type(trainer)

    class Own(kind):
        def _calculate_rewards(self, *args):
            return super()._calculate_rewards(*args) * 2

        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) + 0.01

        def log(self, logs, start_time=None):
            super().log(logs | {"own": 1.0}, start_time)

    trainer.__class__ = Own
    trainer.train()
    return [log_rows(trainer), weights_of(trainer)]


def predictions(make: Make) -> Any:
    return stock_metrics(make(per_device_eval_batch_size=4).predict(held_out()).metrics)


def weights_of(trainer: Any) -> list[float]:
    """The sum of each parameter."""
    return [value.double().sum().item() for value in adapter_of(trainer).values()]


CASES = [
    *(events_of_callbacks, log_history, evaluations, best_model, early_stop, resumed_run, trained_twice),
    *(streamed_data, subclass, predictions),
]


def assert_alike(ours: Any, stock: Any, where: str = "") -> None:
    """Equal, except for float32 rounding over a few updates."""
    if isinstance(stock, dict):
        assert set(ours) == set(stock), where
        for name, value in stock.items():
            assert_alike(ours[name], value, f"{where} {name}")
    elif isinstance(stock, list):
        assert len(ours) == len(stock), where
        for i, (our_value, value) in enumerate(zip(ours, stock, strict=True)):
            assert_alike(our_value, value, f"{where} {i}")
    elif isinstance(stock, float) and not math.isnan(stock):
        assert ours == pytest.approx(stock, rel=2e-3, abs=2e-4), where
    elif not isinstance(stock, float):
        assert ours == stock, where


@pytest.mark.parametrize("case", slow_but(CASES, [events_of_callbacks, log_history]), ids=lambda case: case.__name__)
def test_same_as_stock_trl(make_of, case):
    assert_alike(case(make_of(GRPOExtTrainer)), case(make_of(GRPOTrainer)))


def test_one_line_keeps_the_objective_of_trl(make_of):
    """`**TRL_DEFAULTS` trains as the defaults of stock TRL do."""
    stock = make_of(GRPOTrainer)(**TRL_DEFAULTS)
    start = adapter_of(stock)
    stock.train()
    ours = make_of(GRPOExtTrainer)(**TRL_DEFAULTS)
    ours.train()
    for name, value in adapter_of(stock).items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(adapter_of(ours)[name], value, atol=1e-7, rtol=1e-5)
