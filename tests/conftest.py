"""What the tests share: everything offline, a tiny random llama, the embedded model, and a trainer on them."""

import gc
import itertools
import os
import re
import subprocess
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ROOT / "recipes" / "tiny_math" / "model"
TINY_DATA = ROOT / "recipes" / "tiny_math" / "data"

PROMPTS = ["Question: 1+2=?\nAnswer:", "Question: 30+41=?\nAnswer:", "2+2=", "Question: 7+8=?\nAnswer:"]


# Of every trainer in the tests: on the CPU in float32, quiet, one log line a step, nothing saved.
SETTINGS: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def random_lora(**changes: Any) -> LoraConfig:
    """LoRA with a random B: with B = 0, as it starts by default, every gradient of A is 0 and KL and ratio trivial."""
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | {"init_lora_weights": False, "lora_dropout": 0.0}
        | changes
    )


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random text spreads over: the share of digits among its characters."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def half_dead(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """`share_of_digits`, but two of the four prompts always earn the same."""
    scores = share_of_digits(completions)
    return [0.5 if prompt in PROMPTS[:2] else score for prompt, score in zip(prompts, scores, strict=True)]


def likes_step_two(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """A reward that is highest in the evaluation after step 2."""
    return [1.0 / (1 + abs(trainer_state.global_step - 2))] * len(completions)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: where files run side by side, nothing waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_recipe_math.py")


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """accelerate collects garbage in every train(); half a second each time, as long as every import is looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def path_of_children() -> Iterator[None]:
    """Recipes keep their folder off the path of child processes; one that a test calls in this process would do so for
    every test after it."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def small_shape(tokenizer: Any) -> dict[str, Any]:
    """Two layers of hidden size 32, for the config of any architecture."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**small_shape(tokenizer)))


@pytest.fixture
def small_model(tokenizer) -> LlamaForCausalLM:
    return small_llama(tokenizer)


@pytest.fixture
def tiny_model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL)


@pytest.fixture
def build(tokenizer, tmp_path) -> Callable[..., Any]:
    """`build(model, beta=0.0)`: a trainer on PROMPTS, ours unless `trainer=GRPOTrainer` asks for stock TRL; `arguments`
    are more of the trainer's own."""

    def make(
        model: Any,
        *,
        trainer: type[GRPOTrainer] = GRPOExtTrainer,
        reward: Any = share_of_digits,
        peft_config: Any = None,
        prompts: list[Any] = PROMPTS,
        columns: dict[str, list[Any]] | None = None,
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
            # A worker takes seconds to start, and random adapters break rules: see test_pool.py, test_preflight.py.
            settings |= {"reward_workers": 0, "guards": False}
        return trainer(
            model,
            reward_funcs=reward,
            args=config(**settings | changes),
            train_dataset=Dataset.from_dict({"prompt": prompts, **(columns or {})}),
            processing_class=tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **(arguments or {}),
        )

    return make


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def log_of(trainer: Any, name: str) -> list[float]:
    """What was logged under this name, step by step."""
    return [row[name] for row in trainer.state.log_history if name in row]


def count_draws(trainer: Any) -> list[int]:
    """Rows that are drawn in each call of the sampler from now on."""
    draws, generate = [], trainer._generate_single_turn

    def counted(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draws.append(len(prompt_ids))
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = counted
    return draws


def own_words_of(inputs: dict[str, Any], tokenizer: Any, of_others: re.Pattern[str]) -> torch.Tensor:
    """1 on the tokens of each completion that the model wrote, shape (B, C): all but those that the pattern finds."""
    mask_BC = inputs["completion_mask"].clone()
    found = 0
    for row, ids in enumerate(inputs["completion_ids"]):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        starts = list(itertools.accumulate(map(len, pieces), initial=0))
        for words in of_others.finditer("".join(pieces)):
            mask_BC[row, starts.index(words.start()) : starts.index(words.end())] = 0
            found += 1
    assert found > 0
    return mask_BC


DDP = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"


def in_two_processes(script: str, folder: Path, *more: str, seconds: float, options: str | list[str] = DDP) -> None:
    """Run a script of the tests in two processes on the CPU; what they say is in `folder/log`.

    `--multi_gpu` is the launcher of several processes, whatever device the script asks for: `--cpu` starts just one.

    Args:
        more: arguments of the script, after the folder.
        options: of `accelerate launch`; a list starts it as often, side by side, as on several machines.
    """
    launcher = Path(sys.executable).with_name("accelerate")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    commands = [
        [launcher, "launch", *of_one.split(), script, folder, *more]
        for of_one in ([options] if isinstance(options, str) else options)
    ]
    with (folder / "log").open("w+") as log:
        shared = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
        launched = [subprocess.Popen(command, **shared) for command in commands]
        try:
            for launch in launched:
                launch.wait(timeout=seconds)
        finally:
            for launch in launched:
                launch.terminate()  # not kill, which would leave its processes behind
                launch.wait()
        log.seek(0)
        assert not any(launch.returncode for launch in launched), log.read()


def texts_of(trainer: Any, part: dict[str, Any]) -> list[tuple[str, str]]:
    """Prompt and completion of each row of a micro-batch."""
    decode = trainer.processing_class.batch_decode
    ids = part["prompt_ids"], part["completion_ids"]
    return list(zip(*(decode(of, skip_special_tokens=True) for of in ids), strict=True))
