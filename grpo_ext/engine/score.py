"""Scoring: log-probs and entropies of completions, with each prompt computed once for all of its siblings.

In: a `ScoringBatch`, TRL's padded rows grouped by prompt. Out: the values of TRL's own scoring, shape (B, C), in the
order of the rows, and, if requested, the exact KL of each token's distribution to the reference's.

    prompt[:-1] --(batch of 1)--> cache --fork--> [last prompt token | completion[:-1]] of each sibling -> log-probs

`score_chunked.py` does the same in chunks, for the gradient of a micro-batch that is too large for one graph.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion, T tokens of
all its completions, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.batch import (
    ChunkScores,
    Scores,
    ScoringBatch,
    Siblings,
    assemble_scores,
    empty_scores,
    prompt_ids,
    prompt_weights,
)
from grpo_ext.engine.decode_cache import can_share_slot
from grpo_ext.engine.grouped_attention import grouped_attention
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.moe_aux_loss import RouterRecorder, RouterSums, total_router_sums
from grpo_ext.engine.prefill import cache_states, fork, prefill_in_segments, prompt_segments, with_states

ALWAYS_PACKED_TOKENS = 512  # a chunk with at most this many tokens is packed even if its prompt is shorter


def score(lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead) -> Scores:
    """Score the whole batch on one autograd graph, or without a graph if the caller has disabled gradients.

    Args:
        lm: a causal language model with a `DynamicCache` that can be forked.
    """
    chunks: list[ChunkScores] = []
    prompt_sums = []
    with RouterRecorder(lm, batch.experts_per_token) as router:
        scorer = ChunkScorer(lm=lm, batch=batch, head=head, router=router)
        for siblings in batch.joined_groups():
            limit = None if torch.is_grad_enabled() else batch.chunk_tokens
            segments, cache = prompt_segments(siblings.prompt_tokens - 1, limit), None
            caches = prefill_in_segments(lm, prompt_ids(batch, siblings), limit, **router.forward_options)
            for segment, boundary in zip(segments, caches, strict=True):
                prompt_sums.append(router.pop_sums(prompt_weights(batch, siblings, len(segment))))
                cache = boundary
            chunks += [scorer.score(siblings, chunk, cache) for chunk in batch.chunks(siblings)]
    if not chunks:
        return empty_scores(lm, batch)
    total = total_router_sums(prompt_sums + [chunk.router_sums for chunk in chunks])
    return assemble_scores(batch, chunks, None if total is None else total.loss())


@dataclass(frozen=True, kw_only=True)
class ChunkScorer:
    """Scores chunks of a group on the cache of its prompt. The fields are as in `score`."""

    lm: PreTrainedModel
    batch: ScoringBatch
    head: TiledHead
    router: RouterRecorder

    def score(self, siblings: Siblings, chunk: range, cache: DynamicCache | None) -> ChunkScores:
        """Score one chunk.

        Args:
            chunk: a range into `siblings.rows`.
            cache: the prefilled prompt, all tokens except the last one; None for a prompt of one token.
        """
        rows = [siblings.rows[i] for i in chunk]
        longest = siblings.lengths[chunk.start]
        prompt_indices = [siblings.prompt_indices[i] for i in chunk]
        # The last token predicts nothing, but it is routed. A forward of a single token would be treated as a decoding
        # step, in which recurrent layers write into their states in place.
        width = max(2, longest + (self.batch.experts_per_token is not None))
        targets_nc = pad(self.batch.completion_ids_BC[rows, :longest], (0, width - longest))
        lengths_n1 = targets_nc.new_tensor([[siblings.lengths[i]] for i in chunk])
        places_c = torch.arange(width, device=targets_nc.device)
        is_token_nc = places_c < lengths_n1
        first_n1 = targets_nc.new_tensor([[siblings.prompts[i][-1]] for i in prompt_indices])
        ids_nc = torch.cat([first_n1, targets_nc[:, :-1]], dim=1)
        positions_nc = (siblings.prompt_tokens - 1 + places_c).expand_as(targets_nc)
        router_sums = None
        if cache is not None and self._should_pack(siblings, chunk, cache):
            hidden_TH = self._forward_packed(ids_nc, positions_nc, is_token_nc, cache)
        else:
            # Padding is on the right, where no token of the row attends, so no attention mask is needed.
            forked = None if cache is None else fork(cache, prompt_indices)
            hidden_TH = self._forward(ids_nc, positions_nc, forked, **self.router.forward_options)[is_token_nc]
            router_sums = self.router.pop_sums(places_c <= lengths_n1)
        return self._score_tokens(rows, hidden_TH, targets_nc, is_token_nc[:, :longest], router_sums)

    def _should_pack(self, siblings: Siblings, chunk: range, cache: DynamicCache) -> bool:
        """Whether to pack the rows of a chunk into one row, without copies of the prompt's states or work on padding.

        Each token then also attends over the masked tokens of the other rows, which is cheap if they are few.
        """
        tokens = sum(siblings.lengths[i] for i in chunk)
        return (
            len(siblings.prompts) == 1
            and len(chunk) > 1
            and tokens <= max(ALWAYS_PACKED_TOKENS, siblings.prompt_tokens)
            and can_share_slot(self.lm, cache)
            and self.batch.experts_per_token is None
        )

    def _forward_packed(self, ids_nc: Tensor, positions_nc: Tensor, is_token_nc: Tensor, cache: DynamicCache) -> Tensor:
        """Run all rows as one row, separated by an attention mask; returns hidden states, shape (T, H)."""
        rows_T, places_T = is_token_nc.nonzero(as_tuple=True)
        sees_TT = (rows_T.unsqueeze(1) == rows_T) & (places_T.unsqueeze(1) >= places_T)
        minimum = torch.finfo(self.lm.dtype).min
        mask_TT = torch.zeros_like(sees_TT, dtype=self.lm.dtype).masked_fill(~sees_TT, minimum)
        ids_1T, positions_1T = ids_nc[is_token_nc].unsqueeze(0), positions_nc[is_token_nc].unsqueeze(0)
        own_cache = with_states(cache, cache_states(cache))  # the forward replaces its layers' states
        mask_11TT = pad(mask_TT, (cache.get_seq_length(), 0))[None, None]
        return self._forward(ids_1T, positions_1T, own_cache, attention_mask=mask_11TT)[0]

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache | None, **options: Any) -> Tensor:
        with grouped_attention():
            output = self.lm.base_model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=False, **options
            )
        return output.last_hidden_state

    def _score_tokens(
        self,
        rows: list[int],
        hidden_TH: Tensor,
        targets_nc: Tensor,
        is_token_nc: Tensor,
        router_sums: RouterSums | None,
    ) -> ChunkScores:
        batch, (n, c) = self.batch, is_token_nc.shape
        targets_T = targets_nc[:, :c][is_token_nc]
        ref_hidden_TH = None
        if batch.ref_hidden_BCH is not None:
            ref_hidden_TH = batch.ref_hidden_BCH[rows, :c][is_token_nc.to(batch.ref_hidden_BCH.device)]
            ref_hidden_TH = ref_hidden_TH.to(hidden_TH.device)

        def score_at(tokens: Tensor | slice, temperature: float) -> Sequence[Tensor | None]:
            logps_T, entropies_T = self.head.score(
                hidden_TH[tokens], targets_T[tokens], temperature, with_entropies=batch.with_entropies
            )
            if ref_hidden_TH is None:
                return logps_T, entropies_T, None
            return logps_T, entropies_T, self.head.exact_kl(hidden_TH[tokens], ref_hidden_TH[tokens], temperature)

        temperatures = [batch.temperatures[row] for row in rows]
        logps_T, entropies_T, kls_T = _score_per_temperature(score_at, temperatures, is_token_nc)
        assert logps_T is not None

        def unflatten(values_T: Tensor) -> Tensor:
            rest = values_T.shape[1:]
            # `masked_scatter` keeps the scores on the graph even if there are no tokens.
            return values_T.new_zeros(n, c, *rest).masked_scatter(is_token_nc.view(n, c, *(1 for _ in rest)), values_T)

        return ChunkScores(
            rows=rows,
            logps_nc=unflatten(logps_T),
            entropies_nc=None if entropies_T is None else unflatten(entropies_T),
            kls_nc=None if kls_T is None else unflatten(kls_T),
            hidden_ncH=unflatten(hidden_TH).cpu() if batch.with_hidden else None,
            router_sums=router_sums,
        )


def _score_per_temperature(
    score_at: Callable[[Tensor | slice, float], Sequence[Tensor | None]],
    temperatures_n: list[float],
    is_token_nc: Tensor,
) -> Sequence[Tensor | None]:
    """Scores of all tokens, with one call of `score_at` for all tokens of the same temperature."""
    row_of_T = is_token_nc.nonzero()[:, 0].tolist() if len(set(temperatures_n)) > 1 else []
    if not row_of_T:
        return score_at(slice(None), temperatures_n[0])
    tokens_at: dict[float, list[int]] = {}
    for token, row in enumerate(row_of_T):
        tokens_at.setdefault(temperatures_n[row], []).append(token)
    device = is_token_nc.device
    scored = [score_at(torch.tensor(tokens, device=device), temperature) for temperature, tokens in tokens_at.items()]
    inverse = torch.tensor([token for tokens in tokens_at.values() for token in tokens], device=device).argsort()
    columns = ([part for part in parts if part is not None] for parts in zip(*scored, strict=True))
    return [torch.cat(parts)[inverse] if parts else None for parts in columns]
