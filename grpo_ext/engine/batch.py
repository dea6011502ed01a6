"""Which rows are siblings, and how many of them fit a budget: index algebra, no model.

In: the padded prompts and completions of a micro-batch. Out: one `Siblings` per distinct prompt, in order of first
appearance. Rows share a prompt when their unpadded prompt ids are equal, whatever reward group they belong to.

    prompts  [. a b] [. a b] [c d e] [a b .]     ->  rows (0, 1, 3) on (a, b);  row (2,) on (c, d, e)

Legend: B rows, S prompt tokens, C completion tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_ext.engine.moe_aux_loss import RouterSums

NO_GRAD_CHUNK_FACTOR = 8  # a no-grad pass needs less than 1/8 of the activation memory per token


@dataclass(frozen=True)
class Siblings:
    """Rows on one prompt, or on several of one length.

    Attributes:
        prompts: token ids without padding; at least one each, as many for all.
        rows: indices into the micro-batch, the longest completion first.
        lengths: completion tokens of each of these rows.
        prompt_indices: of each of these rows, its index in `prompts`.
    """

    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    prompt_indices: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])


def strip_padding(ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[int, ...]]:
    """The token ids of each row where its mask is 1, for padding on either side."""
    rows = zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)
    return [tuple(token for token, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows]


def prompt_groups(prompt_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """A number per row, equal for rows with the same prompt, shape (B,)."""
    prompts = strip_padding(prompt_ids_BS, mask_BS)
    return torch.tensor([prompts.index(prompt) for prompt in prompts], device=prompt_ids_BS.device)


def find_siblings(input_ids_BT: Tensor, attention_mask_BT: Tensor, completion_tokens: int) -> list[Siblings] | None:
    """Group the rows of TRL's concatenation [prompt | completion] by prompt.

    Args:
        input_ids_BT: token ids, shape (B, S + C).
        attention_mask_BT: 1 on tokens, 0 on padding. Prompts may be padded on either side, completions on the right;
            a row whose completion is masked away altogether has length 0.
        completion_tokens: C.

    Returns:
        One entry a distinct prompt; None where a completion has a hole in its mask or a prompt is empty, which a
        shared prompt cannot express.
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
    """Join groups whose prompts have the same number of tokens, which run side by side without padding.

    Args:
        max_rows, max_tokens: bounds on what is joined, counted as in `split_into_chunks`; a group stays whole.
    """
    joined: list[list[Siblings]] = []
    for group in sorted(siblings, key=lambda group: group.prompt_tokens):
        together = [*joined[-1], group] if joined else [group]
        rows = sum(len(member.rows) for member in together)
        tokens = rows * (group.prompt_tokens + max(member.lengths[0] for member in together))
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
    """Members are (length, row, prompt)."""
    lengths, rows, prompt_indices = zip(*sorted(members, key=lambda member: -member[0]), strict=True)
    return Siblings(tuple(prompts), rows, lengths, prompt_indices)


def order_by_group(groups_B: list[int]) -> list[int]:
    """An order of the rows in which those of a group are neighbours: groups by their first row, rows as they were.

    `[7, 3, 7, 5, 3]` -> `[0, 2, 1, 4, 3]`. Rows that were shuffled before give groups in random order.
    """
    first = {group: groups_B.index(group) for group in set(groups_B)}
    return sorted(range(len(groups_B)), key=lambda row: (first[groups_B[row]], row))


def split_into_chunks(
    siblings: Siblings, max_rows: int | None, max_tokens: int | None, *, with_empty: bool = False
) -> list[range]:
    """Cut the rows of a group, longest first, into chunks; each is padded to its own longest row.

    Args:
        max_rows: rows a chunk at most; None for no bound.
        max_tokens: bound on rows x (prompt + longest completion), since attention copies the prompt's states for every
            row; a chunk has one row at least. None for no bound.
        with_empty: whether rows of length 0 are in a chunk too; log-probs do not need them.

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


@dataclass(frozen=True, kw_only=True)
class ScoringBatch:
    """A micro-batch to score.

    Attributes:
        completion_ids_BC: padded on the right; what stands on padding is not read.
        groups: the rows by prompt.
        temperatures: that the rows were drawn at, one each.
        separate_groups: more rows by prompt, which are not joined with the others in one forward.
        max_rows: rows of one forward at most; None for whole groups.
        chunk_tokens: tokens that carry a graph at once; None for no bound.
        experts_per_token: of a mixture of experts whose load-balancing loss is asked for; None for no such loss.
        with_entropies: whether entropies are asked for.
        with_hidden: whether the last hidden states are, in a pass without a graph.
        ref_hidden_BCH: those of the reference, for an exact KL to it; None for no such KL.
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

    @property
    def all_groups(self) -> list[Siblings]:
        return self.groups + self.separate_groups

    def joined_groups(self) -> list[Siblings]:
        """Everything, prompts of one length together."""
        return [
            joined
            for groups in (self.groups, self.separate_groups)
            for joined in join_equal_lengths(groups, self.max_rows, self.chunk_tokens)
        ]

    def chunks(self, siblings: Siblings) -> list[range]:
        # The tokens of a prompt count for its empty rows too: the last one, which rows begin with, as any other.
        with_empty = self.experts_per_token is not None
        return split_into_chunks(siblings, self.max_rows, self.chunk_tokens, with_empty=with_empty)

    def fits_one_chunk(self) -> bool:
        """Whether a plain graph over everything stays within the budget."""
        if self.chunk_tokens is None:
            return True
        tokens = sum((1 + len(s.rows)) * s.prompt_tokens + len(s.rows) * s.lengths[0] for s in self.all_groups)
        return tokens <= self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the rows scored: shapes (B, C), float32, 0 on padding.

    Attributes:
        entropies_BC, kls_BC: where they were asked for.
        hidden_BCH: where it was asked for; in host memory, 0 on padding.
        aux_loss: the load-balancing loss, where it was asked for.
    """

    logps_BC: Tensor
    entropies_BC: Tensor | None
    kls_BC: Tensor | None
    hidden_BCH: Tensor | None
    aux_loss: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of a group: which of the micro-batch, and what they scored."""

    rows: list[int]
    logps_nc: Tensor
    entropies_nc: Tensor | None
    kls_nc: Tensor | None
    hidden_ncH: Tensor | None
    routed: RouterSums | None

    @property
    def differentiable(self) -> list[Tensor | None]:
        return [self.logps_nc, self.entropies_nc, self.kls_nc]


def assemble_scores(rows: ScoringBatch, chunks: list[Chunk], aux_loss: Tensor | None) -> Scores:
    """Pad the chunks to C and put their rows back into the order of the micro-batch; rows without tokens are 0."""
    B, C = rows.completion_ids_BC.shape
    order = [row for chunk in chunks for row in chunk.rows]
    empty = sorted(set(range(B)) - set(order))
    back = torch.tensor(order + empty).argsort()

    def together(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        if not there:
            return None
        padded = [pad(part, (0, 0) * (part.dim() - 2) + (0, C - part.size(1))) for part in there]
        return torch.cat([*padded, padded[0].new_zeros(len(empty), *padded[0].shape[1:])])[back.to(padded[0].device)]

    logps_BC = together([chunk.logps_nc for chunk in chunks])
    assert logps_BC is not None  # the caller has rows with tokens
    return Scores(
        logps_BC=logps_BC,
        entropies_BC=together([chunk.entropies_nc for chunk in chunks]),
        kls_BC=together([chunk.kls_nc for chunk in chunks]),
        hidden_BCH=together([chunk.hidden_ncH for chunk in chunks]),
        aux_loss=aux_loss,
    )


def empty_scores(lm: nn.Module, rows: ScoringBatch) -> Scores:
    """Scores of rows without tokens: zeros on the graph of every trainable parameter, as processes expect it."""
    parts = [parameter.flatten()[:0].sum() for parameter in lm.parameters() if parameter.requires_grad]
    zeros_BC = rows.completion_ids_BC.new_zeros(rows.completion_ids_BC.shape, dtype=torch.float32) + sum(parts)
    return Scores(
        logps_BC=zeros_BC,
        entropies_BC=zeros_BC if rows.with_entropies else None,
        kls_BC=None if rows.ref_hidden_BCH is None else zeros_BC,
        hidden_BCH=None,
        aux_loss=None,
    )


def prompt_ids(rows: ScoringBatch, siblings: Siblings) -> Tensor:
    return torch.tensor(siblings.prompts, device=rows.completion_ids_BC.device)


def prompt_weights(rows: ScoringBatch, siblings: Siblings, tokens: int) -> Tensor:
    """For how many rows each of so many tokens of each prompt counts."""
    counts = [[siblings.prompt_indices.count(i)] for i in range(len(siblings.prompts))]
    return torch.tensor(counts, device=rows.completion_ids_BC.device).expand(-1, tokens)
