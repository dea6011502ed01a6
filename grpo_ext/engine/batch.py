"""A micro-batch grouped by prompt, and its scores: the input and output of scoring. Index algebra only, no model.

In: TRL's padded rows [prompt | completion]. Out: one `Siblings` per distinct prompt, in order of first appearance. Rows
are siblings if their prompt ids without padding are equal, even if they belong to different reward groups:

    prompts  [. a b] [. a b] [c d e] [a b .]     ->  rows (0, 1, 3) on (a, b);  row (2,) on (c, d, e)

A `ScoringBatch` holds these groups and what to compute for them. `Scores` holds the results in the order of the rows.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion, H hidden
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_ext.engine.moe_aux_loss import RouterSums

NO_GRAD_CHUNK_FACTOR = 8  # a no-grad pass needs less than 1/8 of the activation memory per token


@dataclass(frozen=True)
class Siblings:
    """Rows that share a prompt, or rows of several prompts of the same length.

    Attributes:
        prompts: token ids without padding; at least one token each, all of the same length.
        rows: indices into the micro-batch, longest completion first.
        lengths: number of completion tokens of each of these rows.
        prompt_indices: index into `prompts` for each of these rows.
    """

    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    prompt_indices: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])


@dataclass(frozen=True, kw_only=True)
class ScoringBatch:
    """A micro-batch to score, and which scores to compute.

    Attributes:
        completion_ids_BC: token ids, padded on the right; the padding ids have no effect.
        groups: the rows by prompt.
        temperatures: sampling temperature of each row.
        separate_groups: further groups, whose rows never share a forward with those of `groups`.
        max_rows: maximum rows per forward; None for whole groups.
        chunk_tokens: maximum tokens that carry a graph at the same time; None for no limit.
        experts_per_token: top-k of a mixture of experts if its load-balancing loss is requested, else None.
        with_entropies: compute entropies.
        with_hidden: return the last hidden states (no-grad passes only).
        ref_hidden_BCH: last hidden states of the reference if the exact KL to it is requested, else None.
        loss: the loss of the scores of all rows, if its gradient in the scores of a row depends on no other row. Its
            gradient is then computed together with the scores, see `loss_in_chunks.py`.
    """

    completion_ids_BC: Tensor
    groups: list[Siblings]
    temperatures: list[float]
    separate_groups: list[Siblings] = field(default_factory=list)
    max_rows: int | None = None
    chunk_tokens: int | None = None
    experts_per_token: int | None = None
    with_entropies: bool = True
    with_hidden: bool = False
    ref_hidden_BCH: Tensor | None = None
    loss: "Callable[[Scores], Tensor] | None" = None

    @property
    def all_groups(self) -> list[Siblings]:
        return self.groups + self.separate_groups

    def joined_groups(self) -> list[Siblings]:
        """All groups, with those of equal prompt length joined."""
        return [
            joined
            for groups in (self.groups, self.separate_groups)
            for joined in join_equal_lengths(groups, self.max_rows, self.chunk_tokens)
        ]

    def chunks(self, siblings: Siblings) -> list[range]:
        """Ranges into `siblings.rows`, one per forward."""
        # Router statistics count prompt tokens once per row, including rows with empty completions; those rows must be
        # run too.
        with_empty = self.experts_per_token is not None
        return split_into_chunks(siblings, self.max_rows, self.chunk_tokens, with_empty=with_empty)

    @property
    def tokens(self) -> int:
        """Tokens with a graph at the same time if all rows are on one graph, counted as `chunk_tokens` counts them."""
        return sum((1 + len(s.rows)) * s.prompt_tokens + len(s.rows) * s.lengths[0] for s in self.all_groups)

    def fits_one_chunk(self) -> bool:
        """Whether one plain graph over all rows stays within `chunk_tokens`."""
        return self.chunk_tokens is None or self.tokens <= self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a micro-batch: shapes (B, C), float32, 0 on padding. A score that was not requested is None.

    Attributes:
        hidden_BCH: last hidden states, in host memory.
        aux_loss: load-balancing loss of a mixture of experts, a scalar.
        loss_gradient: a scalar 0 with the gradient of `ScoringBatch.loss`; the other scores then have none. None if the
            scores have gradients, or if there are none.
        chunk_tokens: the limit that the scores were computed with; less than requested after an out-of-memory error.
    """

    logps_BC: Tensor
    entropies_BC: Tensor | None
    kls_BC: Tensor | None
    hidden_BCH: Tensor | None
    aux_loss: Tensor | None
    loss_gradient: Tensor | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkScores:
    """Scores of one chunk of a group; `rows`, or `rows_n` on the device, are indices into the micro-batch."""

    rows: list[int]
    rows_n: Tensor
    logps_nc: Tensor
    entropies_nc: Tensor | None
    kls_nc: Tensor | None
    hidden_ncH: Tensor | None
    router_sums: RouterSums | None

    @property
    def differentiable(self) -> list[Tensor | None]:
        return [self.logps_nc, self.entropies_nc, self.kls_nc]

    @staticmethod
    def joined(parts: "Sequence[ChunkScores]") -> "ChunkScores":
        """The scores of a chunk from those of consecutive tokens of it."""

        def join(scores: Sequence[Tensor | None]) -> Tensor | None:
            computed = [part for part in scores if part is not None]
            return torch.cat(computed, dim=1) if computed else None

        logps_nc, entropies_nc, kls_nc = map(join, zip(*(part.differentiable for part in parts), strict=True))
        assert logps_nc is not None
        return replace(parts[0], logps_nc=logps_nc, entropies_nc=entropies_nc, kls_nc=kls_nc)

    def detached(self) -> "ChunkScores":
        """The same scores without a graph."""
        logps_nc, entropies_nc, kls_nc = (None if part is None else part.detach() for part in self.differentiable)
        assert logps_nc is not None
        return replace(self, logps_nc=logps_nc, entropies_nc=entropies_nc, kls_nc=kls_nc)


# Grouping


def strip_padding(ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[int, ...]]:
    """The token ids of each row at which its mask is 1; padding may be on either side."""
    rows = zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)
    return [tuple(token for token, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows]


def prompt_groups(prompt_ids_BS: Tensor, mask_BS: Tensor) -> list[int]:
    """One number per row, equal for rows with the same prompt."""
    prompts = strip_padding(prompt_ids_BS, mask_BS)
    return [prompts.index(prompt) for prompt in prompts]


def find_siblings(input_ids_BT: Tensor, attention_mask_BT: Tensor, completion_tokens: int) -> list[Siblings] | None:
    """Group the rows of TRL's concatenation [prompt | completion] by prompt.

    Args:
        input_ids_BT: token ids, shape (B, S + C).
        attention_mask_BT: 1 on tokens, 0 on padding. Prompts may be padded on either side, completions on the right;
            a row with a fully masked completion has length 0.
        completion_tokens: C.

    Returns:
        One entry per distinct prompt. None if a completion mask has a hole or a prompt is empty, because such rows
        cannot share a prompt.
    """
    split = input_ids_BT.size(1) - completion_tokens
    prompts = strip_padding(input_ids_BT[:, :split], attention_mask_BT[:, :split])
    rows_of: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, (prompt, mask) in enumerate(zip(prompts, attention_mask_BT[:, split:].tolist(), strict=True)):
        length = sum(map(bool, mask))
        if not prompt or not all(mask[:length]):
            return None
        rows_of.setdefault(prompt, []).append((length, row))
    return [_siblings([prompt], [(*member, 0) for member in members]) for prompt, members in rows_of.items()]


def join_equal_lengths(siblings: list[Siblings], max_rows: int | None, max_tokens: int | None) -> list[Siblings]:
    """Join groups whose prompts have the same number of tokens, to run them in one forward without padding.

    Args:
        max_rows: maximum rows of a joined group; None for no limit.
        max_tokens: limit on (prompts + rows) x prompt tokens + rows x longest completion; None for no limit.
    """
    joined: list[list[Siblings]] = []
    for group in sorted(siblings, key=lambda group: group.prompt_tokens):
        together = [*joined[-1], group] if joined else [group]
        rows = sum(len(member.rows) for member in together)
        longest = max(member.lengths[0] for member in together)
        tokens = (len(together) + rows) * group.prompt_tokens + rows * longest
        if (
            group.prompt_tokens == together[0].prompt_tokens
            and (max_rows is None or rows <= max_rows)
            and (max_tokens is None or tokens <= max_tokens)
            and joined
        ):
            joined[-1] = together
        else:
            joined.append([group])
    return [_join(groups) for groups in joined]


def _join(groups: list[Siblings]) -> Siblings:
    prompts = [prompt for group in groups for prompt in group.prompts]
    members = [
        (length, row, prompts.index(group.prompts[i]))
        for group in groups
        for length, row, i in zip(group.lengths, group.rows, group.prompt_indices, strict=True)
    ]
    return _siblings(prompts, members)


def _siblings(prompts: list[tuple[int, ...]], members: list[tuple[int, int, int]]) -> Siblings:
    """Build a `Siblings` from members (length, row, prompt index)."""
    lengths, rows, prompt_indices = zip(*sorted(members, key=lambda member: -member[0]), strict=True)
    return Siblings(tuple(prompts), rows, lengths, prompt_indices)


def order_by_group(groups_B: list[int]) -> list[int]:
    """A permutation of the rows that makes the rows of each group adjacent.

    Groups are ordered by their first row; rows keep their order within a group: `[7, 3, 7, 5, 3]` ->
    `[0, 2, 1, 4, 3]`. Shuffled rows therefore give groups in random order.
    """
    first = {group: groups_B.index(group) for group in set(groups_B)}
    return sorted(range(len(groups_B)), key=lambda row: (first[groups_B[row]], row))


def split_into_chunks(
    siblings: Siblings, max_rows: int | None, max_tokens: int | None, *, with_empty: bool = False
) -> list[range]:
    """Split the rows of a group, longest first, into chunks; each chunk is padded to its own longest row.

    Args:
        max_rows: maximum rows per chunk; None for no limit.
        max_tokens: limit on rows x (prompt + longest completion), because attention copies the prompt's states for
            every row. A chunk has at least one row. None for no limit.
        with_empty: include rows of length 0, which log-probs do not need.

    Returns:
        Ranges into `siblings.rows`.
    """
    count = sum(length > 0 or with_empty for length in siblings.lengths)
    chunks, start = [], 0
    while start < count:
        rows = count - start if max_rows is None else min(max_rows, count - start)
        if max_tokens is not None:
            rows = min(rows, max(1, max_tokens // (siblings.prompt_tokens + siblings.lengths[start])))
        chunks.append(range(start, start + rows))
        start += rows
    return chunks


# Scores


def assemble_scores(batch: ScoringBatch, chunks: list[ChunkScores], aux_loss: Tensor | None) -> Scores:
    """Pad the chunks to C and restore the row order of the micro-batch; rows without tokens score 0."""
    B, C = batch.completion_ids_BC.shape
    order = [row for chunk in chunks for row in chunk.rows]
    empty = sorted(set(range(B)) - set(order))
    inverse = torch.tensor(order + empty).argsort()

    def assemble(parts: list[Tensor | None]) -> Tensor | None:
        computed = [part for part in parts if part is not None]
        if not computed:
            return None
        padded = [pad(part, (0, 0) * (part.dim() - 2) + (0, C - part.size(1))) for part in computed]
        rows = torch.cat([*padded, padded[0].new_zeros(len(empty), *padded[0].shape[1:])])
        return rows[inverse.to(padded[0].device)]

    logps_BC = assemble([chunk.logps_nc for chunk in chunks])
    assert logps_BC is not None  # the caller passes at least one chunk
    return Scores(
        logps_BC=logps_BC,
        entropies_BC=assemble([chunk.entropies_nc for chunk in chunks]),
        kls_BC=assemble([chunk.kls_nc for chunk in chunks]),
        hidden_BCH=assemble([chunk.hidden_ncH for chunk in chunks]),
        aux_loss=aux_loss,
    )


def empty_scores(lm: nn.Module, batch: ScoringBatch) -> Scores:
    """Scores of a batch without completion tokens: zeros that depend on every trainable parameter, as DDP requires."""
    parts = [parameter.flatten()[:0].sum() for parameter in lm.parameters() if parameter.requires_grad]
    zeros_BC = batch.completion_ids_BC.new_zeros(batch.completion_ids_BC.shape, dtype=torch.float32) + sum(parts)
    return Scores(
        logps_BC=zeros_BC,
        entropies_BC=zeros_BC if batch.with_entropies else None,
        kls_BC=None if batch.ref_hidden_BCH is None else zeros_BC,
        hidden_BCH=None,
        aux_loss=None,
    )


def prompt_ids(batch: ScoringBatch, siblings: Siblings) -> Tensor:
    """Token ids of the group's prompts, one row per prompt, on the device of the batch."""
    return torch.tensor(siblings.prompts, device=batch.completion_ids_BC.device)


def prompt_weights(batch: ScoringBatch, siblings: Siblings, tokens: int) -> Tensor:
    """The number of rows per prompt, repeated over `tokens` tokens; shape (prompts, tokens)."""
    counts = [[siblings.prompt_indices.count(i)] for i in range(len(siblings.prompts))]
    return torch.tensor(counts, device=batch.completion_ids_BC.device).expand(-1, tokens)
