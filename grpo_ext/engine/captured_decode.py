"""Decoding in buffers of fixed size: a CUDA graph replays a step instead of launching its kernels one by one.

On a GPU, a decode step of a small model takes as long as Python and PyTorch need to launch its thousands of kernels. A
CUDA graph launches all of them at once, but always runs the same kernels on the same addresses. Here, tokens, positions
and the KV cache therefore stay in place. Attention covers cached tokens in steps of `BUCKET_STEPS` decode steps, and
rows leave only when half of the places would be free. For each of these shapes, one graph is captured. Devices other
than CPUs and CUDA use the same buffers, without a graph.

The graph holds the forward only. The draw, the logits processors and the stopping criteria run as usual, so they and
the random state cannot differ. A graph lives until the shape changes or the rollout ends: its buffers would otherwise
take the memory of the KV cache from the update, and it would read adapters at addresses that no longer hold them.

Legend: R slots, n rows of a slot, Q = R * n places, B rows of the batch, T cached tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.autocast import same_autocast_without_cache
from grpo_ext.engine.decode_cache import HIDDEN, BufferedLayer, DecodeBatch, reallocate
from grpo_ext.engine.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

BUCKET_STEPS = 256
MASK_ALIGNMENT = 16  # CUDA attention copies a mask whose rows are not a multiple of this many tokens

Step = Callable[[], Tensor]
StepRunner = Callable[[Hashable, Step], Tensor]  # the result of a step; steps of the same shape have the same key


def run_uncaptured(_: Hashable, step: Step) -> Tensor:
    """Run every step as it is."""
    return step()


def capture_cuda_graph(step: Step) -> Step:
    """A function that replays the kernels of a step, and returns its result at the same address each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class CapturedSteps:
    """Runs the first step of a shape as it is, and replays later ones. Used as a context, at whose end everything that
    was captured is freed.

    The first replay is compared with the step itself. If they differ, or if a step cannot be captured, all further
    steps run as they are, after a log line with the reason.

    Args:
        capture: turns a step into its replay. The step must do the same if it runs twice.
    """

    def __init__(self, capture: Callable[[Step], Step] = capture_cuda_graph):
        self._capture: Callable[[Step], Step] | None = capture
        self._key: Hashable = None
        self._replay: Step | None = None
        self._is_checked = False

    def __call__(self, key: Hashable, step: Step) -> Tensor:
        """The result of the step. The next call may overwrite it."""
        if self._capture is None:
            return step()
        if key != self._key:  # the first step also loads kernels and makes workspaces, which a capture cannot do
            self._forget()
            self._key = key
            return step()
        try:
            self._replay = self._replay or self._capture(step)
            output = self._replay()
            if not self._is_checked:
                torch.testing.assert_close(output, step(), rtol=0.05, atol=0.05)  # workspaces and rounding may differ
                self._is_checked = True
            return output
        except Exception as error:  # whatever it was, the step itself may still run
            self._forget()
            if is_out_of_memory(error):  # fewer rows may fit
                raise
            self._capture = None
            reason = str(error) or type(error).__name__
            logger.warning("Decoding launches its kernels one by one, which is slower than a CUDA graph: %s", reason)
            return step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def _forget(self) -> None:
        self._key = self._replay = None


class FixedDecodeBatch(DecodeBatch):
    """A `DecodeBatch` whose tensors keep their addresses from step to step. Every layer of its cache must be a
    `DynamicLayer`, and the model's attention must accept a custom mask, see `can_share_slot`.

    Args:
        max_new_tokens: tokens that a row may sample; the last one is not fed to the model.
        run: runs each step.
    """

    def __init__(
        self,
        caches: Sequence[DynamicCache],
        prompts: list[int],
        slots: list[list[int]],
        prompt_lengths: Tensor,
        *,
        max_new_tokens: int,
        run: StepRunner,
    ):
        self._run = run
        width = max(map(len, slots))
        self._tokens = max(cache.get_seq_length() for cache in caches)
        capacity = self._tokens + width * (max_new_tokens - 1)
        self._capacity = capacity + -capacity % MASK_ALIGNMENT
        self._bucket = BUCKET_STEPS * width
        super().__init__(caches, prompts, slots, prompt_lengths)
        self._all_owners_RT = self._owners_RT.new_full((len(slots), self._capacity), HIDDEN)
        self._all_owners_RT[:, : self._tokens] = self._owners_RT
        self._fed_B = torch.zeros_like(prompt_lengths)

    def _make_room(self) -> None:
        for layer in self._cache.layers:
            layer.__class__ = _FixedLayer
            layer.buffers = reallocate(layer.keys, self._capacity), reallocate(layer.values, self._capacity)
            layer.show(self._tokens)

    def _set_slots(self, slots: list[list[int]]) -> None:
        super()._set_slots(slots)
        self._cursor_n = torch.arange(self._tokens, self._tokens + self._rows_Rn.size(1), device=self._device)
        for layer in self._cache.layers:
            layer.cursor_n = self._cursor_n

    def step(self, lm: PreTrainedModel, tokens_B: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See `DecodeBatch.step`. The next step may overwrite the logits."""
        width = self._rows_Rn.size(1)
        self._show(self._tokens + width)
        self._fed_B.copy_(tokens_B)

        def forward() -> Tensor:
            self._all_owners_RT.index_copy_(1, self._cursor_n, self._owners_Rn)
            mask_RnT = self._mask_by_owner(self._owners_RT, lm.dtype)
            with same_autocast_without_cache(self._device.type):
                return self._forward(lm, self._fed_B, mask_RnT, **options)

        logits_QV = self._run((self._owners_RT.size(1), *self._rows_Rn.shape), forward)
        self._tokens += width
        self._cursor_n += width
        self._positions_B += 1
        return self._used(logits_QV)

    def _show(self, tokens: int) -> None:
        """Let attention see this many tokens, rounded up to a whole bucket; those without an owner are masked."""
        shown = min(self._capacity, tokens + -tokens % self._bucket)
        self._owners_RT = self._all_owners_RT[:, :shown]
        for layer in self._cache.layers:
            layer.show(shown)

    def skip_steps(self, steps: int) -> None:
        """See `DecodeBatch.skip_steps`."""
        self._tokens += steps * self._rows_Rn.size(1)

    def drop_finished(self, is_active: Sequence[bool]) -> None:
        """Remove inactive rows, once half of the places or more would be free."""
        slots = [[row for row in slot if is_active[row]] for slot in self._slots]
        used = sum(map(bool, slots)) * max(map(len, slots))
        if 2 * used <= self._rows_Rn.numel():
            self._owners_RT = self._all_owners_RT
            self._keep(slots)
            self._all_owners_RT = self._owners_RT


class _FixedLayer(BufferedLayer):
    """Writes new tokens at the cursor, which all layers share, and returns all tokens that are shown."""

    cursor_n: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.cursor_n, new.to(buffer.dtype))  # autocast may leave keys in float32, not values
        return self.keys, self.values
