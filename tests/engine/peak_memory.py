"""Peak memory of an update, each case measured in a fresh process; test_memory.py runs this file as a program.

python tests/engine/peak_memory.py '[["shared", 256, 64, 4, 1024], ...]'     how, S, C, G, chunk_tokens
[12345678, ...]                                                      bytes, one number per case
"""

import json
import os
import sys
from functools import partial
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grpo_ext.engine.batch import ScoringBatch, find_siblings
from grpo_ext.engine.install import install_shared_scoring
from tests.tools.memory import in_a_fork, peak_above
from tests.tools.models import random_lora

# Per token, all layers together hold about 100 kB of activations and 4 kB of keys and values.
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def build() -> Any:
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lm.set_attn_implementation("sdpa")
    add_fused_lm_head(lm, outputs=("log_probs", "entropy"))
    install_shared_scoring(lm)
    return get_peft_model(lm, random_lora())


def update(model: Any, how: str, S: int, C: int, G: int, chunk_tokens: int | None) -> None:
    """Forward and backward of a loss on the log-probs and entropies of G siblings, C tokens each."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, SHAPE["vocab_size"], (1, S), generator=generator).expand(G, S)
    ids = torch.cat([prompt, torch.randint(2, SHAPE["vocab_size"], (G, C), generator=generator)], dim=1)
    mask = torch.ones_like(ids)
    if how == "shared":
        siblings = find_siblings(ids, mask, C)
        rows = ScoringBatch(
            completion_ids_BC=ids[:, S:],
            groups=siblings,
            temperatures=[1.0] * len(ids),
            chunk_tokens=chunk_tokens,
            loss=lambda scores: loss_of(scores.logps_BC, scores.entropies_BC),
        )
        model(scoring_batch=rows).loss_gradient.backward()
        return
    labels = ids.clone()
    labels[:, :S] = -100
    output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    loss_of(output.log_probs, output.entropy).backward()


def loss_of(logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    return (logps - 0.01 * entropies).mean()


def measure(model: Any, case: tuple[Any, ...]) -> int:
    how, chunk_tokens = case[0], case[-1]
    update(model, how, 64, 16, 4, chunk_tokens and 160)  # the first call makes permanent allocations
    model.zero_grad()
    return peak_above(lambda: update(model, *case))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = build()
    print(json.dumps([in_a_fork(partial(measure, model, tuple(case))) for case in json.loads(sys.argv[1])]))
