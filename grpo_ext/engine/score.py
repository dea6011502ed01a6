"""Scoring: log-probs and entropies of completions, with each prompt computed once for all of its siblings.

In: a `ScoringBatch`, TRL's padded rows grouped by prompt. Out: the values of TRL's own scoring, shape (B, C), in the
order of the rows, and, if requested, the exact KL of each token's distribution to the reference's.

    prompt[:-1] --(batch of 1)--> cache --fork--> [last prompt token | completion[:-1]] of each sibling -> log-probs

`score_chunked.py` does the same in chunks, for the gradient of a micro-batch that is too large for one graph.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion, T tokens of
all its completions, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
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
from grpo_ext.engine.chunk_indices import ChunkIndices, index_chunks
from grpo_ext.engine.decode_cache import can_share_slot
from grpo_ext.engine.flash_lengths import flash_lengths
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
        groups = batch.joined_groups()
        scorer = ChunkScorer(lm=lm, batch=batch, head=head, router=router, indices=index_chunks(batch, groups))
        for siblings in groups:
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
    """Scores chunks of a group on the cache of its prompt. The fields are as in `score`.

    Attributes:
        indices: those of every chunk, from `index_chunks`.
    """

    lm: PreTrainedModel
    batch: ScoringBatch
    head: TiledHead
    router: RouterRecorder
    indices: Mapping[int, ChunkIndices]

    def score(self, siblings: Siblings, chunk: range, cache: DynamicCache | None) -> ChunkScores:
        """Score one chunk.

        Args:
            chunk: a range into `siblings.rows`.
            cache: the prefilled prompt, all tokens except the last one; None for a prompt of one token.
        """
        indices = self.indices[siblings.rows[chunk.start]]
        ids_BC, width = self.batch.completion_ids_BC, indices.width
        targets_nc = pad(ids_BC.index_select(0, indices.rows_n)[:, : indices.longest], (0, width - indices.longest))
        places_c = torch.arange(width, device=ids_BC.device)
        ids_nc = torch.cat([indices.first_n1, targets_nc[:, :-1]], dim=1)
        positions_nc = (siblings.prompt_tokens - 1 + places_c).expand_as(targets_nc)
        router_sums = None
        if cache is not None and self._should_pack(siblings, chunk, cache):
            hidden_TH = self._forward_packed(ids_nc, positions_nc, indices, cache)
        else:
            # Padding is on the right, where no token of the row attends, so no attention mask is needed.
            forked = None if cache is None else fork(cache, indices.prompts_n)
            hidden_ncH = self._forward(ids_nc, positions_nc, forked, **self.router.forward_options)
            hidden_TH = hidden_ncH.flatten(0, 1).index_select(0, indices.places_T)
            router_sums = self.router.pop_sums(places_c <= indices.lengths_n1)
        return self._score_tokens(
            hidden_TH, targets_nc.flatten().index_select(0, indices.places_T), indices, router_sums
        )

    def score_segment(
        self, siblings: Siblings, chunk: range, segment: range, cache: DynamicCache | None
    ) -> tuple[ChunkScores, DynamicCache]:
        """Score some tokens of a chunk of one row.

        Args:
            segment: which tokens of the completion.
            cache: everything before them, without the token before the first of them; it is modified.

        Returns:
            Their scores, and the cache with their states added.
        """
        indices = self.indices[siblings.rows[chunk.start]]
        targets_1c = self.batch.completion_ids_BC.index_select(0, indices.rows_n)[:, : indices.longest]
        ids_1c = torch.cat([indices.first_n1, targets_1c[:, :-1]], dim=1)
        tokens = slice(segment.start, segment.stop)
        places_1s = torch.arange(segment.start, segment.stop, device=ids_1c.device).unsqueeze(0)
        with grouped_attention():
            output = self.lm.base_model(
                input_ids=ids_1c[:, tokens],
                position_ids=siblings.prompt_tokens - 1 + places_1s,
                past_key_values=cache,
                use_cache=True,
                **flash_lengths(self.lm, ids_1c[:, tokens], cache),
            )
        part = indices.part(segment)
        scores = self._score_tokens(output.last_hidden_state[0], targets_1c[0, tokens], part, None)
        return scores, output.past_key_values

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

    def _forward_packed(
        self, ids_nc: Tensor, positions_nc: Tensor, indices: ChunkIndices, cache: DynamicCache
    ) -> Tensor:
        """Run all rows as one row, separated by an attention mask; returns hidden states, shape (T, H)."""
        rows_T, places_T = indices.places_T // indices.width, indices.places_T % indices.width
        sees_TT = (rows_T.unsqueeze(1) == rows_T) & (places_T.unsqueeze(1) >= places_T)
        minimum = torch.finfo(self.lm.dtype).min
        mask_TT = torch.zeros_like(sees_TT, dtype=self.lm.dtype).masked_fill(~sees_TT, minimum)
        ids_1T, positions_1T = (
            values_nc.flatten().index_select(0, indices.places_T).unsqueeze(0) for values_nc in (ids_nc, positions_nc)
        )
        own_cache = with_states(cache, cache_states(cache))  # the forward replaces its layers' states
        mask_11TT = pad(mask_TT, (cache.get_seq_length(), 0))[None, None]
        return self._forward(ids_1T, positions_1T, own_cache, attention_mask=mask_11TT)[0]

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache | None, **options: Any) -> Tensor:
        with grouped_attention():
            output = self.lm.base_model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=cache,
                use_cache=False,
                **flash_lengths(self.lm, ids, cache),
                **options,
            )
        return output.last_hidden_state

    def _score_tokens(
        self, hidden_TH: Tensor, targets_T: Tensor, indices: ChunkIndices, router_sums: RouterSums | None
    ) -> ChunkScores:
        batch, n, c = self.batch, len(indices.rows), indices.longest
        ref_hidden_TH = None
        if batch.ref_hidden_BCH is not None:
            ref_hidden_ncH = batch.ref_hidden_BCH[indices.rows, indices.start : indices.start + c]
            ref_hidden_TH = ref_hidden_ncH.flatten(0, 1)[indices.host_scores_T].to(hidden_TH.device)

        def score_at(tokens: Tensor | slice, temperature: float) -> Sequence[Tensor | None]:
            logps_T, entropies_T = self.head.score(
                hidden_TH[tokens], targets_T[tokens], temperature, with_entropies=batch.with_entropies
            )
            if ref_hidden_TH is None:
                return logps_T, entropies_T, None
            return logps_T, entropies_T, self.head.exact_kl(hidden_TH[tokens], ref_hidden_TH[tokens], temperature)

        temperatures_T = [batch.temperatures[row] for row in indices.rows]
        if len(set(temperatures_T)) > 1:
            temperatures_T = [batch.temperatures[row] for row in indices.host_rows_T]
        logps_T, entropies_T, kls_T = _score_per_temperature(score_at, temperatures_T, targets_T.device)
        assert logps_T is not None

        def unflatten(values_T: Tensor) -> Tensor:
            rest = values_T.shape[1:]
            # `index_copy` keeps the scores on the graph even if there are no tokens.
            return values_T.new_zeros(n * c, *rest).index_copy(0, indices.scores_T, values_T).view(n, c, *rest)

        return ChunkScores(
            rows=indices.rows,
            rows_n=indices.rows_n,
            logps_nc=unflatten(logps_T),
            entropies_nc=None if entropies_T is None else unflatten(entropies_T),
            kls_nc=None if kls_T is None else unflatten(kls_T),
            hidden_ncH=unflatten(hidden_TH).cpu() if batch.with_hidden else None,
            router_sums=router_sums,
        )


def _score_per_temperature(
    score_at: Callable[[Tensor | slice, float], Sequence[Tensor | None]],
    temperatures_T: list[float],
    device: torch.device,
) -> Sequence[Tensor | None]:
    """Scores of all tokens, with one call of `score_at` for all tokens of the same temperature."""
    tokens_at: dict[float, list[int]] = {}
    for token, temperature in enumerate(temperatures_T):
        tokens_at.setdefault(temperature, []).append(token)
    if len(tokens_at) <= 1:
        return score_at(slice(None), next(iter(tokens_at), 1.0))
    scored = [score_at(torch.tensor(tokens, device=device), temperature) for temperature, tokens in tokens_at.items()]
    inverse = torch.tensor([token for tokens in tokens_at.values() for token in tokens], device=device).argsort()
    columns = ([part for part in parts if part is not None] for parts in zip(*scored, strict=True))
    return [torch.cat(parts)[inverse] if parts else None for parts in columns]
