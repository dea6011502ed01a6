"""Log-probs and entropies of completions, with every prompt read once for all of its siblings.

In: TRL's padded rows [prompt | completion]. Out: what TRL's own scoring gives, shape (B, C), rows in their order.

    prompt[:-1] --(batch of 1)--> states --fork--> [last prompt token | completion[:-1]] of each sibling -> log-probs

`chunked.py` does the same in chunks, for the gradient of a micro-batch that is too large for one graph.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion, T tokens of
all its completions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.groups import Siblings, cut_rows, of_one_length
from grpo_ext.engine.lanes import can_pack
from grpo_ext.engine.prompt_cache import fork, read_states, write_states
from grpo_ext.engine.reading import read
from grpo_ext.engine.routing import RouterSums, Routing, total

PACKED_TOKENS = 512  # of a chunk, that go into one row even on a shorter prompt


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A micro-batch to score.

    Attributes:
        completion_ids_BC: padded on the right; what stands on padding is not read.
        siblings: the rows by prompt.
        max_rows: rows of one forward at most; None for whole groups.
        chunk_tokens: tokens that carry a graph at once; None for no bound.
        experts_per_token: of a mixture of experts whose load-balancing loss is asked for; None for no such loss.
    """

    completion_ids_BC: Tensor
    siblings: list[Siblings]
    max_rows: int | None = None
    chunk_tokens: int | None = None
    experts_per_token: int | None = None

    def chunks(self, siblings: Siblings) -> list[range]:
        # The tokens of a prompt count for its empty rows too: the last one, which rows begin with, as any other.
        with_empty = self.experts_per_token is not None
        return cut_rows(siblings, self.max_rows, self.chunk_tokens, with_empty=with_empty)

    def fit_one_chunk(self) -> bool:
        """Whether a plain graph over everything stays within the budget."""
        if self.chunk_tokens is None:
            return True
        tokens = sum((1 + len(s.rows)) * s.prompt_tokens + len(s.rows) * s.lengths[0] for s in self.siblings)
        return tokens <= self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the rows scored: shapes (B, C), float32, 0 on padding.

    Attributes:
        entropies_BC: None where the head gives none (a reference model's).
        balance: the load-balancing loss, where it was asked for.
    """

    logps_BC: Tensor
    entropies_BC: Tensor | None
    balance: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of a group: which of the micro-batch, and what they scored."""

    rows: list[int]
    logps_nc: Tensor
    entropies_nc: Tensor | None
    routed: RouterSums | None


def score(lm: PreTrainedModel, rows: Rows, head: Callable[..., Any]) -> Scores:
    """Score on the graph that the caller's grad mode asks for, all of it at once.

    Args:
        lm: a causal language model; it must give a `DynamicCache` that can be forked.
        head: its forward with TRL's fused head: `head(input_ids=..., shift_labels=..., fused_lm_head=True, ...)`.
    """
    chunks: list[Chunk] = []
    routed = []  # of the prompts
    with Routing(lm, rows.experts_per_token) as routing:
        scorer = Scorer(lm=lm, rows=rows, head=head, routing=routing)
        for siblings in of_one_length(rows.siblings, rows.max_rows, rows.chunk_tokens):
            cache = read(lm, prompt_ids(rows, siblings), **routing.options)
            if cache is not None:
                routed.append(routing.take(prompt_weights(rows, siblings, siblings.prompt_tokens - 1)))
            chunks += [scorer.score(siblings, chunk, cache) for chunk in rows.chunks(siblings)]
    logps_BC, entropies_BC = assemble(rows, chunks)
    everything = total(routed + [chunk.routed for chunk in chunks])
    balance = None if everything is None else everything.loss()
    return Scores(logps_BC=logps_BC, entropies_BC=entropies_BC, balance=balance)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores some rows of a group on the cache of its prompt; the arguments are those of `score`."""

    lm: PreTrainedModel
    rows: Rows
    head: Callable[..., Any]
    routing: Routing

    def score(self, siblings: Siblings, chunk: range, cache: DynamicCache | None) -> Chunk:
        """Score the rows `chunk`, a range into `siblings.rows`, on a cache of all prompt tokens but the last one."""
        members = [siblings.rows[i] for i in chunk]
        longest = siblings.lengths[chunk.start]
        prompt_of = [siblings.prompt_of[i] for i in chunk]
        # The last token says nothing about log-probs, but it is routed. One token alone would be taken for a decoding
        # step, in which recurrent layers write into the states in place.
        width = max(2, longest + (self.rows.experts_per_token is not None))
        targets_nc = pad(self.rows.completion_ids_BC[members, :longest], (0, width - longest))
        lengths_n1 = targets_nc.new_tensor([[siblings.lengths[i]] for i in chunk])
        places_c = torch.arange(width, device=targets_nc.device)
        first_n1 = targets_nc.new_tensor([[siblings.prompts[i][-1]] for i in prompt_of])
        inputs_nc = {
            "input_ids": torch.cat([first_n1, targets_nc[:, :-1]], dim=1),
            "position_ids": (siblings.prompt_tokens - 1 + places_c).expand_as(targets_nc),
            "shift_labels": targets_nc.masked_fill(places_c >= lengths_n1, -100),
        }
        if cache is not None and self._packs(siblings, chunk, cache):
            logps_nc, entropies_nc = self._score_packed(inputs_nc, places_c < lengths_n1, cache)
            routed = None
        else:
            # Padding stands on the right, where no token of the row looks: no attention mask is needed.
            forked = None if cache is None else fork(cache, prompt_of)
            output = self.head(**inputs_nc, past_key_values=forked, fused_lm_head=True, **self.routing.options)
            logps_nc, entropies_nc = output.log_probs, output.entropy
            routed = self.routing.take(places_c <= lengths_n1)
        return Chunk(
            rows=members,
            logps_nc=logps_nc[:, :longest],
            entropies_nc=None if entropies_nc is None else entropies_nc[:, :longest],
            routed=routed,
        )

    def _packs(self, siblings: Siblings, chunk: range, cache: DynamicCache) -> bool:
        """Whether the rows go into one, where the prompt's states need no copies, and padding no multiplications.

        Each token then also looks past those of the other rows, which costs little where these are few.
        """
        tokens = sum(siblings.lengths[i] for i in chunk)
        return (
            len(siblings.prompts) == 1
            and len(chunk) > 1
            and tokens <= max(PACKED_TOKENS, siblings.prompt_tokens)
            and can_pack(self.lm, cache)
            # TRL's head takes the mask of a mixture of experts for one of padding.
            and not getattr(self.lm.config.get_text_config(), "output_router_logits", False)
            and self.rows.experts_per_token is None
        )

    def _score_packed(
        self, inputs_nc: dict[str, Tensor], is_token_nc: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, Tensor | None]:
        """All rows as one, T tokens, which an attention mask keeps apart."""
        rows_T, places_T = is_token_nc.nonzero(as_tuple=True)
        sees_TT = (rows_T.unsqueeze(1) == rows_T) & (places_T.unsqueeze(1) >= places_T)
        hidden = torch.finfo(self.lm.dtype).min
        mask_TT = torch.zeros_like(sees_TT, dtype=self.lm.dtype).masked_fill(~sees_TT, hidden)
        output = self.head(
            **{name: values_nc[is_token_nc].unsqueeze(0) for name, values_nc in inputs_nc.items()},
            past_key_values=write_states(cache, read_states(cache)),  # whose layers the forward replaces
            attention_mask=pad(mask_TT, (cache.get_seq_length(), 0))[None, None],
            fused_lm_head=True,
        )

        def spread(scores_1T: Tensor) -> Tensor:
            return scores_1T.new_zeros(is_token_nc.shape).masked_scatter(is_token_nc, scores_1T)

        return spread(output.log_probs), None if output.entropy is None else spread(output.entropy)


def assemble(rows: Rows, chunks: list[Chunk]) -> tuple[Tensor, Tensor | None]:
    """Pad the chunks to C and put their rows back into the order of the micro-batch; rows without tokens are 0."""
    B, C = rows.completion_ids_BC.shape
    order = [row for chunk in chunks for row in chunk.rows]
    empty = sorted(set(range(B)) - set(order))
    back = torch.tensor(order + empty, device=rows.completion_ids_BC.device).argsort()

    def together(parts: list[Tensor]) -> Tensor:
        padded = [pad(part, (0, C - part.size(1))) for part in parts]
        return torch.cat([*padded, padded[0].new_zeros(len(empty), C)])[back]

    entropies = [chunk.entropies_nc for chunk in chunks if chunk.entropies_nc is not None]
    return together([chunk.logps_nc for chunk in chunks]), together(entropies) if entropies else None


def prompt_ids(rows: Rows, siblings: Siblings) -> Tensor:
    return torch.tensor(siblings.prompts, device=rows.completion_ids_BC.device)


def prompt_weights(rows: Rows, siblings: Siblings, tokens: int) -> Tensor:
    """For how many rows each of so many tokens of each prompt counts."""
    counts = [[siblings.prompt_of.count(i)] for i in range(len(siblings.prompts))]
    return torch.tensor(counts, device=rows.completion_ids_BC.device).expand(-1, tokens)
