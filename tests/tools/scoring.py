"""Rows to score, prompts to sample from, scores from TRL's own path, and gradients of scores."""

import torch

from grpo_ext.engine.batch import ScoringBatch, find_siblings
from tests.tools.architectures import PAD, TEMPERATURE


def padded_batch(prompt_lengths=(150, 90), lengths=((12, 7, 1, 9), (5, 12, 0, 3)), seed=1):
    """Rows [prompt | completion] as TRL pads them: prompts on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    S, C = max(prompt_lengths), max(max(group) for group in lengths)
    ids, mask = [], []
    for prompt_length, group in zip(prompt_lengths, lengths, strict=True):
        prompt = torch.randint(2, 61, (prompt_length,), generator=generator)
        for length in group:
            completion = torch.randint(2, 61, (length,), generator=generator)
            row = torch.zeros(S + C, dtype=torch.long)
            row[S - prompt_length : S], row[S : S + length] = prompt, completion
            keep = torch.zeros(S + C, dtype=torch.long)
            keep[S - prompt_length : S + length] = 1
            ids.append(row)
            mask.append(keep)
    order = torch.randperm(len(ids), generator=generator)
    return torch.stack(ids)[order], torch.stack(mask)[order], C


def score_by_trl(model, ids, mask, C):
    """TRL's own scoring, row by row without left padding. With left padding, eager attention in float64 would turn
    padded positions into NaN, and models with absolute positions would see shifted ones."""
    outputs = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        kept = torch.cat([row_mask[:-C], torch.ones_like(row_mask[-C:])]).bool()
        row_ids, row_mask = row_ids[kept].unsqueeze(0), row_mask[kept].unsqueeze(0)
        labels = row_ids.masked_fill(row_mask == 0, -100)
        labels[:, :-C] = -100
        output = model(input_ids=row_ids, attention_mask=row_mask, labels=labels, fused_lm_head=True)
        outputs.append((output.log_probs[:, -C:], output.entropy[:, -C:]))
    return tuple(torch.cat(kind) for kind in zip(*outputs, strict=True))


def scoring_batch_of(ids, mask, C, **settings):
    siblings = find_siblings(ids, mask, C)
    return ScoringBatch(
        completion_ids_BC=ids[:, -C:], groups=siblings, temperatures=[TEMPERATURE] * len(ids), **settings
    )


def gradients(model, outputs, seed=2, **options):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    loss = sum((output.double() * w.to(output.device)).sum() for output, w in zip(outputs, weights, strict=True))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), **options), strict=True))


def prompts_of(*lengths, siblings=4, seed=0):
    """Prompts padded on the left, each repeated `siblings` times in a row, as TRL does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[-length:] = torch.randint(2, 61, (length,), generator=generator)
    ids = ids.repeat_interleave(siblings, dim=0)
    return ids, (ids != PAD).long()
