"""Where the tokens of each chunk are, computed on the host and copied to the device once per micro-batch.

The host waits for the device whenever it copies a list or asks for the positions of a mask.

Legend: n rows of a chunk, c tokens of its longest completion, w >= c places per row of its forward, T tokens of all its
completions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_ext.engine.batch import ScoringBatch, Siblings


@dataclass(frozen=True, kw_only=True)
class ChunkIndices:
    """The indices of one chunk, with its longest completion first. Tensors are on the device of the batch.

    Attributes:
        rows: indices into the micro-batch, and `rows_n` the same as a tensor.
        longest, width: c and w.
        prompts_n: index into the prompts of the group for each row.
        first_n1: the last prompt token of each row, from which its first token is predicted.
        lengths_n1: completion tokens of each row.
        places_T: places of the tokens in a flat (n, w); `scores_T` those in a flat (n, c).
        host_rows_T: row of the micro-batch of each token.
        host_scores_T: `scores_T` in host memory.
        start: number of completion tokens that come before these.
    """

    rows: list[int]
    rows_n: Tensor
    prompts_n: Tensor
    longest: int
    width: int
    first_n1: Tensor
    lengths_n1: Tensor
    places_T: Tensor
    scores_T: Tensor
    host_rows_T: list[int]
    host_scores_T: Tensor
    start: int = 0

    def part(self, segment: range) -> "ChunkIndices":
        """The indices of some tokens of a chunk of one row."""
        (row,), scores_T = self.rows, torch.arange(len(segment), device=self.rows_n.device)
        return replace(
            self,
            longest=len(segment),
            width=len(segment),
            places_T=scores_T,
            scores_T=scores_T,
            host_rows_T=[row] * len(segment),
            host_scores_T=torch.arange(len(segment)),
            start=segment.start,
        )


def index_chunks(batch: ScoringBatch, groups: Sequence[Siblings]) -> dict[int, ChunkIndices]:
    """The indices of every chunk of these groups, by the first row of the chunk."""
    chunks = [(siblings, chunk) for siblings in groups for chunk in batch.chunks(siblings)]
    on_host = [_integers(batch, siblings, chunk) for siblings, chunk in chunks]
    flat = torch.tensor([value for parts in on_host for part in parts for value in part], dtype=torch.long)
    on_device = flat.to(batch.completion_ids_BC.device)
    sizes = [len(part) for parts in on_host for part in parts]
    host, device = iter(flat.split(sizes)), iter(on_device.split(sizes))
    indexed = {}
    for siblings, chunk in chunks:
        rows_n, prompts_n, first_n, lengths_n, places_T, scores_T = itertools.islice(device, 6)
        *_, host_scores_T = itertools.islice(host, 6)
        rows = [siblings.rows[i] for i in chunk]
        indexed[rows[0]] = ChunkIndices(
            rows=rows,
            rows_n=rows_n,
            prompts_n=prompts_n,
            longest=siblings.lengths[chunk.start],
            width=_width(batch, siblings, chunk),
            first_n1=first_n.unsqueeze(1),
            lengths_n1=lengths_n.unsqueeze(1),
            places_T=places_T,
            scores_T=scores_T,
            host_rows_T=[siblings.rows[i] for i in chunk for _ in range(siblings.lengths[i])],
            host_scores_T=host_scores_T,
        )
    return indexed


def _integers(batch: ScoringBatch, siblings: Siblings, chunk: range) -> tuple[list[int], ...]:
    """Rows, prompts, first tokens, lengths, places and scores of a chunk, as in `ChunkIndices`."""
    width, longest = _width(batch, siblings, chunk), siblings.lengths[chunk.start]
    tokens = [(i, place) for i, row in enumerate(chunk) for place in range(siblings.lengths[row])]
    return (
        [siblings.rows[i] for i in chunk],
        [siblings.prompt_indices[i] for i in chunk],
        [siblings.prompts[siblings.prompt_indices[i]][-1] for i in chunk],
        [siblings.lengths[i] for i in chunk],
        [i * width + place for i, place in tokens],
        [i * longest + place for i, place in tokens],
    )


def _width(batch: ScoringBatch, siblings: Siblings, chunk: range) -> int:
    """Places per row. The last token predicts nothing, but it is routed. A forward of a single token would count as a
    decoding step, in which recurrent layers write into their states in place."""
    return max(2, siblings.lengths[chunk.start] + (batch.experts_per_token is not None))
