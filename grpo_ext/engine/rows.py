"""What goes into scoring and what comes out: a micro-batch by prompt, and its scores in the order of its rows.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion, H hidden
size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_ext.engine.groups import Siblings, cut_rows, of_one_length
from grpo_ext.engine.moe_aux_loss import RouterSums


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A micro-batch to score.

    Attributes:
        completion_ids_BC: padded on the right; what stands on padding is not read.
        siblings: the rows by prompt.
        temperatures: that the rows were drawn at, one each.
        apart: more rows by prompt, which are not joined with the others in one forward.
        max_rows: rows of one forward at most; None for whole groups.
        chunk_tokens: tokens that carry a graph at once; None for no bound.
        experts_per_token: of a mixture of experts whose load-balancing loss is asked for; None for no such loss.
        with_entropies: whether entropies are asked for.
        with_hidden: whether the last hidden states are, in a pass without a graph.
        ref_hidden_BCH: those of the reference, for an exact KL to it; None for no such KL.
    """

    completion_ids_BC: Tensor
    siblings: list[Siblings]
    temperatures: list[float]
    apart: list[Siblings] = field(default_factory=list)
    max_rows: int | None = None
    chunk_tokens: int | None = None
    experts_per_token: int | None = None
    with_entropies: bool = True
    with_hidden: bool = False
    ref_hidden_BCH: Tensor | None = None

    @property
    def everything(self) -> list[Siblings]:
        return self.siblings + self.apart

    def joined(self) -> list[Siblings]:
        """Everything, prompts of one length together."""
        return [
            joined
            for groups in (self.siblings, self.apart)
            for joined in of_one_length(groups, self.max_rows, self.chunk_tokens)
        ]

    def chunks(self, siblings: Siblings) -> list[range]:
        # The tokens of a prompt count for its empty rows too: the last one, which rows begin with, as any other.
        with_empty = self.experts_per_token is not None
        return cut_rows(siblings, self.max_rows, self.chunk_tokens, with_empty=with_empty)

    def fit_one_chunk(self) -> bool:
        """Whether a plain graph over everything stays within the budget."""
        if self.chunk_tokens is None:
            return True
        tokens = sum((1 + len(s.rows)) * s.prompt_tokens + len(s.rows) * s.lengths[0] for s in self.everything)
        return tokens <= self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the rows scored: shapes (B, C), float32, 0 on padding.

    Attributes:
        entropies_BC, kls_BC: where they were asked for.
        hidden_BCH: where it was asked for; in host memory, 0 on padding.
        balance: the load-balancing loss, where it was asked for.
    """

    logps_BC: Tensor
    entropies_BC: Tensor | None
    kls_BC: Tensor | None
    hidden_BCH: Tensor | None
    balance: Tensor | None


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


def assemble(rows: Rows, chunks: list[Chunk], balance: Tensor | None) -> Scores:
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
        balance=balance,
    )


def nothing(lm: nn.Module, rows: Rows) -> Scores:
    """Scores of rows without tokens: zeros on the graph of every trainable parameter, as processes expect it."""
    parts = [parameter.flatten()[:0].sum() for parameter in lm.parameters() if parameter.requires_grad]
    zeros_BC = rows.completion_ids_BC.new_zeros(rows.completion_ids_BC.shape, dtype=torch.float32) + sum(parts)
    return Scores(
        logps_BC=zeros_BC,
        entropies_BC=zeros_BC if rows.with_entropies else None,
        kls_BC=None if rows.ref_hidden_BCH is None else zeros_BC,
        hidden_BCH=None,
        balance=None,
    )


def prompt_ids(rows: Rows, siblings: Siblings) -> Tensor:
    return torch.tensor(siblings.prompts, device=rows.completion_ids_BC.device)


def prompt_weights(rows: Rows, siblings: Siblings, tokens: int) -> Tensor:
    """For how many rows each of so many tokens of each prompt counts."""
    counts = [[siblings.prompt_of.count(i)] for i in range(len(siblings.prompts))]
    return torch.tensor(counts, device=rows.completion_ids_BC.device).expand(-1, tokens)
