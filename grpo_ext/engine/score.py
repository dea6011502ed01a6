"""Log-probs and entropies of completions, with every prompt read once for all of its siblings.

In: TRL's padded rows [prompt | completion]. Out: what TRL's own scoring gives, shape (B, C), rows in their order; and
where it is asked for, the exact KL of each token's distribution to that of a reference.

    prompt[:-1] --(batch of 1)--> states --fork--> [last prompt token | completion[:-1]] of each sibling -> log-probs

`chunked.py` does the same in chunks, for the gradient of a micro-batch that is too large for one graph.

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
    Chunk,
    Scores,
    ScoringBatch,
    Siblings,
    assemble_scores,
    empty_scores,
    prompt_ids,
    prompt_weights,
)
from grpo_ext.engine.decode_cache import can_share_slot
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.moe_aux_loss import RouterRecorder, RouterSums, total
from grpo_ext.engine.prefill import cache_states, fork, prefill, with_states

ALWAYS_PACKED_TOKENS = 512  # of a chunk, that go into one row even on a shorter prompt


def score(lm: PreTrainedModel, rows: ScoringBatch, head: TiledHead) -> Scores:
    """Score on the graph that the caller's grad mode asks for, all of it at once.

    Args:
        lm: a causal language model; it must give a `DynamicCache` that can be forked.
    """
    chunks: list[Chunk] = []
    routed = []  # of the prompts
    with RouterRecorder(lm, rows.experts_per_token) as routing:
        scorer = Scorer(lm=lm, rows=rows, head=head, routing=routing)
        for siblings in rows.joined_groups():
            cache = prefill(lm, prompt_ids(rows, siblings), **routing.forward_options)
            if cache is not None:
                routed.append(routing.pop_sums(prompt_weights(rows, siblings, siblings.prompt_tokens - 1)))
            chunks += [scorer.score(siblings, chunk, cache) for chunk in rows.chunks(siblings)]
    if not chunks:
        return empty_scores(lm, rows)
    everything = total(routed + [chunk.routed for chunk in chunks])
    return assemble_scores(rows, chunks, None if everything is None else everything.loss())


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores some rows of a group on the cache of its prompt; the arguments are those of `score`."""

    lm: PreTrainedModel
    rows: ScoringBatch
    head: TiledHead
    routing: RouterRecorder

    def score(self, siblings: Siblings, chunk: range, cache: DynamicCache | None) -> Chunk:
        """Score the rows `chunk`, a range into `siblings.rows`, on a cache of all prompt tokens but the last one."""
        members = [siblings.rows[i] for i in chunk]
        longest = siblings.lengths[chunk.start]
        prompt_indices = [siblings.prompt_indices[i] for i in chunk]
        # The last token says nothing about log-probs, but it is routed. One token alone would be taken for a decoding
        # step, in which recurrent layers write into the states in place.
        width = max(2, longest + (self.rows.experts_per_token is not None))
        targets_nc = pad(self.rows.completion_ids_BC[members, :longest], (0, width - longest))
        lengths_n1 = targets_nc.new_tensor([[siblings.lengths[i]] for i in chunk])
        places_c = torch.arange(width, device=targets_nc.device)
        is_token_nc = places_c < lengths_n1
        first_n1 = targets_nc.new_tensor([[siblings.prompts[i][-1]] for i in prompt_indices])
        ids_nc = torch.cat([first_n1, targets_nc[:, :-1]], dim=1)
        positions_nc = (siblings.prompt_tokens - 1 + places_c).expand_as(targets_nc)
        routed = None
        if cache is not None and self._packs(siblings, chunk, cache):
            hidden_TH = self._read_packed(ids_nc, positions_nc, is_token_nc, cache)
        else:
            # Padding stands on the right, where no token of the row looks: no attention mask is needed.
            forked = None if cache is None else fork(cache, prompt_indices)
            hidden_TH = self._read(ids_nc, positions_nc, forked, **self.routing.forward_options)[is_token_nc]
            routed = self.routing.pop_sums(places_c <= lengths_n1)
        return self._score_tokens(members, hidden_TH, targets_nc, is_token_nc[:, :longest], routed)

    def _packs(self, siblings: Siblings, chunk: range, cache: DynamicCache) -> bool:
        """Whether the rows go into one, where the prompt's states need no copies, and padding no multiplications.

        Each token then also looks past those of the other rows, which costs little where these are few.
        """
        tokens = sum(siblings.lengths[i] for i in chunk)
        return (
            len(siblings.prompts) == 1
            and len(chunk) > 1
            and tokens <= max(ALWAYS_PACKED_TOKENS, siblings.prompt_tokens)
            and can_share_slot(self.lm, cache)
            and self.rows.experts_per_token is None
        )

    def _read_packed(self, ids_nc: Tensor, positions_nc: Tensor, is_token_nc: Tensor, cache: DynamicCache) -> Tensor:
        """All rows as one, which an attention mask keeps apart; shape (T, H)."""
        rows_T, places_T = is_token_nc.nonzero(as_tuple=True)
        sees_TT = (rows_T.unsqueeze(1) == rows_T) & (places_T.unsqueeze(1) >= places_T)
        hidden = torch.finfo(self.lm.dtype).min
        mask_TT = torch.zeros_like(sees_TT, dtype=self.lm.dtype).masked_fill(~sees_TT, hidden)
        ids_1T, positions_1T = ids_nc[is_token_nc].unsqueeze(0), positions_nc[is_token_nc].unsqueeze(0)
        own_cache = with_states(cache, cache_states(cache))  # whose layers the forward replaces
        mask_11TT = pad(mask_TT, (cache.get_seq_length(), 0))[None, None]
        return self._read(ids_1T, positions_1T, own_cache, attention_mask=mask_11TT)[0]

    def _read(self, ids: Tensor, positions: Tensor, cache: DynamicCache | None, **options: Any) -> Tensor:
        output = self.lm.base_model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=False, **options
        )
        return output.last_hidden_state

    def _score_tokens(
        self, members: list[int], hidden_TH: Tensor, targets_nc: Tensor, is_token_nc: Tensor, routed: RouterSums | None
    ) -> Chunk:
        rows, (n, c) = self.rows, is_token_nc.shape
        targets_T = targets_nc[:, :c][is_token_nc]
        ref_hidden_TH = None
        if rows.ref_hidden_BCH is not None:
            ref_hidden_TH = rows.ref_hidden_BCH[members, :c][is_token_nc.to(rows.ref_hidden_BCH.device)]
            ref_hidden_TH = ref_hidden_TH.to(hidden_TH.device)

        def score(at: Tensor | slice, temperature: float) -> Sequence[Tensor | None]:
            logps_T, entropies_T = self.head.score(
                hidden_TH[at], targets_T[at], temperature, with_entropies=rows.with_entropies
            )
            if ref_hidden_TH is None:
                return logps_T, entropies_T, None
            return logps_T, entropies_T, self.head.divergence(hidden_TH[at], ref_hidden_TH[at], temperature)

        temperatures = [rows.temperatures[row] for row in members]
        logps_T, entropies_T, kls_T = _at_each_temperature(score, temperatures, is_token_nc)
        assert logps_T is not None

        def spread(values_T: Tensor) -> Tensor:
            rest = values_T.shape[1:]
            # This keeps the scores on the graph even where no token counts.
            return values_T.new_zeros(n, c, *rest).masked_scatter(is_token_nc.view(n, c, *(1 for _ in rest)), values_T)

        return Chunk(
            rows=members,
            logps_nc=spread(logps_T),
            entropies_nc=None if entropies_T is None else spread(entropies_T),
            kls_nc=None if kls_T is None else spread(kls_T),
            hidden_ncH=spread(hidden_TH).cpu() if rows.with_hidden else None,
            routed=routed,
        )


def _at_each_temperature(
    score: Callable[[Tensor | slice, float], Sequence[Tensor | None]], temperatures_n: list[float], is_token_nc: Tensor
) -> Sequence[Tensor | None]:
    """What `score` says of each token, called once a distinct temperature, with the tokens of the rows drawn at it."""
    row_of_T = is_token_nc.nonzero()[:, 0].tolist() if len(set(temperatures_n)) > 1 else []
    if not row_of_T:
        return score(slice(None), temperatures_n[0])
    tokens_at: dict[float, list[int]] = {}
    for token, row in enumerate(row_of_T):
        tokens_at.setdefault(temperatures_n[row], []).append(token)
    device = is_token_nc.device
    scored = [score(torch.tensor(tokens, device=device), at) for at, tokens in tokens_at.items()]
    back = torch.tensor([token for tokens in tokens_at.values() for token in tokens], device=device).argsort()
    columns = ([part for part in parts if part is not None] for parts in zip(*scored, strict=True))
    return [torch.cat(parts)[back] if parts else None for parts in columns]
