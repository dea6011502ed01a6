"""Shared by the tests: offline mode, a tiny random llama, the embedded model, and a trainer for them."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
pytest.register_assert_rewrite("tests.tools")  # so that failing assertions there show their values

# The fixtures import what they use: the process that distributes the tests of a parallel run needs no torch.

# What `make quick` leaves out, as paths below tests/. Single cases of a table are marked in the table.
SLOW = (
    "benchmarks/test_benchmarks.py",  # a process for each variant
    "checkpoints/test_killed.py",  # dozens of sessions of one run
    "cli/test_imports.py",  # a new interpreter for each command
    "cli/test_wheel.py",  # builds and installs the package
    "distributed/",  # two processes for every case
    "engine/test_memory.py",  # updates in forks of a fresh process
    "engine/test_smollm2.py",  # a real language model
    "gpu/",  # processes that load every library
    "recipes/test_recipe_math.py",  # whole runs, each in its own process
    "recipes/test_recipes.py",
    "report/test_hub.py",  # runs that push
    "report/test_page.py",  # a browser
    "rewards/test_program.py",  # a process for each program
    "rewards/test_rewards_fuzz.py",  # thousands of texts
    "rewards/test_sandbox.py",  # a process for each attempt and behaviour
)
# Started first: files run in parallel, and none of these should be the last to end.
LONGEST = ("recipes/test_recipe_math.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in SLOW, and run those in LONGEST first."""
    for item in items:
        if place_of(item).startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not place_of(item).startswith(LONGEST))


def place_of(item: pytest.Item) -> str:
    """The path of a test below tests/, and its name: `folder/test_file.py::test_name[case]`."""
    return item.nodeid.removeprefix("tests/")


@pytest.fixture(scope="session", autouse=True)
def freeze_imports():
    """accelerate collects garbage in every train(), which takes half a second each time if all imports are scanned."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def path_of_children() -> Iterator[None]:
    """Recipes set PYTHONSAFEPATH, which keeps their folder off the path of child processes, and PyTorch's allocator. If
    a test calls one in this process, this must not affect later tests."""
    allocator = os.environ.get("PYTORCH_ALLOC_CONF")
    yield
    os.environ.pop("PYTHONSAFEPATH", None)
    if allocator is None:
        os.environ.pop("PYTORCH_ALLOC_CONF", None)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from tests.tools.paths import TINY_MODEL

    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture
def small_model(tokenizer):
    from tests.tools.models import small_llama

    return small_llama(tokenizer)


@pytest.fixture
def tiny_model():
    from transformers import AutoModelForCausalLM

    from tests.tools.paths import TINY_MODEL

    return AutoModelForCausalLM.from_pretrained(TINY_MODEL)


@pytest.fixture
def build(tokenizer, tmp_path) -> Callable[..., Any]:
    """`build(model, beta=0.0)`: a trainer on PROMPTS, or on `data`; ours, or stock TRL with `trainer=GRPOTrainer`.
    `arguments` are further arguments of the trainer."""
    from datasets import Dataset
    from trl import GRPOConfig

    from grpo_ext import GRPOExtConfig, GRPOExtTrainer
    from tests.tools.reward_functions import PROMPTS, share_of_digits
    from tests.tools.training import SETTINGS

    def make(
        model: Any,
        *,
        trainer: Any = GRPOExtTrainer,
        reward: Any = share_of_digits,
        peft_config: Any = None,
        prompts: list[Any] = PROMPTS,
        columns: dict[str, list[Any]] | None = None,
        data: Any = None,
        quantization_config: Any = None,
        arguments: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        settings = SETTINGS | {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
        }
        config = GRPOExtConfig if issubclass(trainer, GRPOExtTrainer) else GRPOConfig
        if config is GRPOExtConfig:
            # Random adapters fail the preflight, and few tests need workers: see test_preflight.py, test_pool.py.
            # Chunks are measured in test_chunk_size.py.
            settings |= {"reward_workers": 0, "guards": False, "chunk_tokens": None}
        return trainer(
            model,
            reward_funcs=reward,
            args=config(**settings | changes),
            train_dataset=data or Dataset.from_dict({"prompt": prompts, **(columns or {})}),
            processing_class=tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **(arguments or {}),
        )

    return make
