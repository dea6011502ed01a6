"""Prompts that were read before their answers are drawn: from the beginning, or from where a kept row ended.

In: token ids, and the states of rows that some of them begin with. Out: caches, and the logits after each prompt.

Legend: k prompts of a forward, P distinct prompts, S tokens to be read, T tokens read before and now, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.prompt_cache import join

Prompt = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PromptStates:
    """Prompts that were read: `caches`, where they are padded on the left, of each prompt its row in them all, and the
    logits after it."""

    caches: list[DynamicCache]
    row_of: dict[Prompt, int]
    logits_PV: Tensor


def read_prompts(
    lm: PreTrainedModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    kept: Mapping[Prompt, DynamicCache],
    **options: Any,
) -> PromptStates:
    """Read each distinct prompt once, from where the longest kept beginning of it ends.

    Those with as many tokens to be read are read in one forward: none of these is padded, on any architecture.

    Args:
        kept: caches of one row each, by the tokens that they have read.
    """
    batches: dict[tuple[bool, int], list[tuple[Prompt, int]]] = {}
    lengths = sorted({len(beginning) for beginning in kept}, reverse=True)
    for prompt in dict.fromkeys(prompts):
        start = next((length for length in lengths if length < len(prompt) and prompt[:length] in kept), 0)
        batches.setdefault((start > 0, len(prompt) - start), []).append((prompt, start))
    caches, logits = [], []
    row_of: dict[Prompt, int] = {}
    for batch in batches.values():
        starts_k = torch.tensor([start for _, start in batch], device=device)
        ids_kS = torch.tensor([prompt[start:] for prompt, start in batch], device=device)
        cache = mask_kT = None
        if any(start for _, start in batch):
            cache = join([kept[prompt[:start]] for prompt, start in batch], torch.arange(len(batch), device=device))
            padding_k = starts_k.max() - starts_k
            if padding_k.any():
                cells_T = torch.arange(int(starts_k.max()) + ids_kS.size(1), device=device)
                mask_kT = (cells_T >= padding_k.unsqueeze(1)).long()
        output = lm(
            input_ids=ids_kS,
            position_ids=starts_k.unsqueeze(1) + torch.arange(ids_kS.size(1), device=device),
            attention_mask=mask_kT,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        caches.append(output.past_key_values)
        logits.append(output.logits[:, -1])
        row_of |= {prompt: len(row_of) + i for i, (prompt, _) in enumerate(batch)}
    return PromptStates(caches=caches, row_of=row_of, logits_PV=torch.cat(logits))
