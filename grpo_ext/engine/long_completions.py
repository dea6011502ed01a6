"""A completion that is longer than a chunk, run in segments along its tokens, as a long prompt is.

    prompt leaves --> segment 1 --> states --> segment 2 --> states --> segment 3      without a graph: all scores
                      <-- gradients <-- segment 2 on leaves <-- gradients <-- segment 3 on leaves

The loss may depend on all tokens of a completion, so its gradient is known only once all segments are scored: the
forward runs twice. Activations then take the memory of one segment. Keys and values still grow with the completion.

Legend: c tokens of the completion.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_ext.engine.batch import ChunkScores, Siblings
from grpo_ext.engine.chunk_gradients import Gradients, LeafStates
from grpo_ext.engine.prefill import cache_states, fork, prompt_segments, with_boundary, with_states
from grpo_ext.engine.score import ChunkScorer


class LongCompletion:
    """One row whose completion is longer than `chunk_tokens`.

    Args:
        chunk: a range into `siblings.rows` with this row only.
        prompt: the states of its prompt, all tokens except the last one.
    """

    def __init__(self, scorer: ChunkScorer, siblings: Siblings, chunk: range, prompt: LeafStates):
        self._scorer, self._siblings, self._chunk, self._prompt = scorer, siblings, chunk, prompt
        self._segments = prompt_segments(siblings.lengths[chunk.start], scorer.batch.chunk_tokens)
        self._boundaries: list[DynamicCache] = []

    def score(self) -> ChunkScores:
        """The scores of the row without a graph. The states at the end of each segment are kept."""
        scored, cache = [], self._prompt.cache()
        with torch.no_grad():
            for segment in self._segments:
                start = None if cache is None else fork(cache, [0])
                part, cache = self._scorer.score_segment(self._siblings, self._chunk, segment, start)
                scored.append(part)
                self._boundaries = with_boundary(self._boundaries, cache)
        return ChunkScores.joined(scored)

    def backward(self, grads: list[Tensor | None], gradients: Gradients) -> None:
        """Add the gradients of the parameters to `gradients` and those of the prompt's states to `prompt`.

        Args:
            grads: the gradient of each score in `ChunkScores.differentiable`, shape (1, c).
        """
        state_grads: list[Tensor] = []
        for k in reversed(range(len(self._segments))):
            segment = self._segments[k]
            leaves, cache = self._prompt.leaves, self._prompt.cache()
            if k > 0:
                leaves = [state.detach().requires_grad_() for state in cache_states(self._boundaries[k - 1])]
                cache = with_states(self._boundaries[k - 1], leaves)
            scored, after = self._scorer.score_segment(self._siblings, self._chunk, segment, cache)
            outputs = [
                (output, grad[:, segment.start : segment.stop])
                for output, grad in zip(scored.differentiable, grads, strict=True)
                if output is not None and grad is not None
            ]
            if state_grads:
                outputs += zip(cache_states(after), state_grads, strict=True)
            state_grads = gradients.backward(outputs, leaves)
            del scored, after, outputs, cache  # freed before those of the next segment are allocated
        self._prompt.add(state_grads)
