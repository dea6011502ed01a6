"""Measure the peak memory of two real training steps; test_plan.py runs this as a separate program.

python tests/memory/planned_memory.py '[["folder of a model", {"prompt": 256, ...}, {"load_in_4bit": true}, false]]'
measured 12345678   bytes at the peak, one line per case, excluding what its process held before it loaded the model
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import torch
from datasets import Dataset
from meters import peak_meter, release_free_memory
from models import word_tokenizer
from transformers import AutoConfig
from trl import get_peft_config

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.memory.step_shapes import StepShape
from grpo_ext.model.load import PolicyConfig, model_init_kwargs, quantization
from tests.tools.memory import in_a_fork
from tests.tools.models import small_llama
from tests.tools.training import SETTINGS

PROMPTS = 8
END_OFTEN = {"sequence_bias": [[[1], 8.0]]}  # after one token in 9, with the random logits of these models


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


def trainer(
    model: Any, policy: PolicyConfig, step: StepShape, tokenizer: Any, folder: str, is_uneven: bool = False
) -> GRPOExtTrainer:
    """If `is_uneven`, every second prompt has half of the tokens, and most completions end before the last token."""
    lengths = [step.prompt // (2 if is_uneven and i % 2 else 1) for i in range(PROMPTS)]
    args = GRPOExtConfig(
        **SETTINGS | {"output_dir": folder, "max_steps": 2, "gradient_checkpointing": step.gradient_checkpointing},
        num_generations=step.generations,
        max_completion_length=step.completion,
        generation_kwargs=END_OFTEN if is_uneven else {"min_new_tokens": step.completion},
        per_device_train_batch_size=step.rows,
        gradient_accumulation_steps=step.accumulation,
        chunk_tokens=step.chunk_tokens,
        beta=step.beta,
        guards=False,
        reward_workers=0,
    )
    is_path = isinstance(model, str)
    args.model_init_kwargs = model_init_kwargs(policy, args) if is_path else None
    return GRPOExtTrainer(
        model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"w{2 + i} " * lengths[i] for i in range(PROMPTS)]}),
        processing_class=tokenizer,
        quantization_config=quantization(policy, args) if is_path else None,
        peft_config=get_peft_config(policy),
    )


def measure(model: str, sizes: dict[str, Any], settings: dict[str, Any], is_uneven: bool) -> int:
    step, policy = StepShape(**sizes), PolicyConfig(model_name_or_path=model, **settings)
    warm_up()
    tokenizer = word_tokenizer(AutoConfig.from_pretrained(model).vocab_size)
    peak = peak_meter()
    release_free_memory()
    before = peak.now()
    with tempfile.TemporaryDirectory() as folder:
        training = trainer(model, policy, step, tokenizer, folder, is_uneven)
        for tensor in (*training.model.parameters(), *training.model.buffers()):
            # A view would keep the whole file in memory, including weights that have been quantized since.
            tensor.data = tensor.data.clone()
        release_free_memory()
        peak.reset()
        training.train()
    return peak.highest() - before


def warm_up() -> None:
    """Train once, so that libraries are loaded, their pages touched, and permanent allocations made."""
    step = StepShape(prompt=8, completion=4, generations=4, rows=4)
    tokenizer = word_tokenizer(64)
    with tempfile.TemporaryDirectory() as folder:
        trainer(small_llama(tokenizer), PolicyConfig(), step, tokenizer, folder).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        print(f"\nmeasured {in_a_fork(partial(measure, *case))}", flush=True)
