"""Estimate the memory of a training step: the engine runs on the meta device while a `MemoryCounter` counts bytes.

In: a policy from `meta_model.py` and the shape of a phase from `step_shapes.py`. Out: the peak bytes of that phase,
excluding weights and optimizer.

The training code itself decides what is kept, copied and freed, so no such rule is repeated here. Differences between
devices are in `device_kernels.py`.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, B rows, T tokens, H hidden size.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from grpo_ext.engine.batch import Scores, ScoringBatch, Siblings
from grpo_ext.engine.captured_decode import FixedDecodeBatch, run_uncaptured
from grpo_ext.engine.decode import PrefilledPrompts, prefill_prompts, start_decoding
from grpo_ext.engine.decode_cache import DecodeBatch
from grpo_ext.engine.draw import draw
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.loss_in_chunks import loss_in_chunks
from grpo_ext.engine.prefill import prefill
from grpo_ext.engine.score import score
from grpo_ext.engine.stacked_lora import stacked_lora
from grpo_ext.memory.counter import MemoryCounter
from grpo_ext.memory.device_kernels import DeviceKernels, HeadCall
from grpo_ext.memory.step_shapes import PhaseShape
from grpo_ext.model.unwrap import base_of

META = torch.device("meta")
# `_fill_cache` appends MIN_GROWTH tokens or 1 / GROWTH_DIVISOR of the cache at a time; the sampler appends one by one.
MIN_GROWTH, GROWTH_DIVISOR = 64, 16


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Peak bytes of one phase of a step.

    Attributes:
        cache: KV cache (or recurrent states) of the prompts; in sampling, of prompts and completions.
        without_head, with_head: peak bytes outside, and during, a call of the LM head.
        head_workspace: the part of `with_head` that the head itself allocates.
        before_decoding: peak bytes while the cache is set up for decoding; 0 except in sampling. It grows faster with
            the number of layers than the peak while decoding, which includes the logits.
    """

    cache: float
    without_head: float
    with_head: float = 0
    head_workspace: float = 0
    before_decoding: float = 0

    @property
    def total(self) -> float:
        return max(self.without_head, self.with_head, self.before_decoding)

    @property
    def head(self) -> float:
        """The head's part of the total; 0 if the peak is not in a call of the head."""
        return self.head_workspace if self.with_head >= self.without_head else 0

    def extrapolated(self, deeper: "PhaseMemory", times: float) -> "PhaseMemory":
        """This phase in a model with more layers: `times` the difference from this phase to `deeper` is added."""

        def extrapolate(name: str) -> float:
            here = getattr(self, name)
            return here + times * (getattr(deeper, name) - here)

        return PhaseMemory(**{field.name: extrapolate(field.name) for field in fields(PhaseMemory)})


@dataclass(frozen=True, kw_only=True)
class _RecordingHead(TiledHead):
    """Records the live bytes each time the LM head would run, instead of running it."""

    counter: MemoryCounter

    def score(
        self, hidden_TH: Tensor, targets_T: Tensor, temperature: float, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        logps_T, entropies_T = _RecordedScore.apply(hidden_TH, self.counter, with_entropies)
        return logps_T, entropies_T if with_entropies else None


class _RecordedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, counter: MemoryCounter, with_entropies: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TH)
        ctx.counter, ctx.with_entropies = counter, with_entropies
        counter.record(HeadCall(tokens=len(hidden_TH), with_entropies=with_entropies, backward=False))
        scores_T = hidden_TH.new_empty(len(hidden_TH), dtype=torch.float32)
        return scores_T, scores_T.clone()

    @staticmethod
    def backward(ctx: Any, *grads_T: Tensor) -> Any:
        (hidden_TH,) = ctx.saved_tensors
        ctx.counter.record(HeadCall(tokens=len(hidden_TH), with_entropies=ctx.with_entropies, backward=True))
        return torch.empty_like(hidden_TH), None, None


def estimate_phase(model: PeftModel, shape: PhaseShape, kernels: DeviceKernels) -> PhaseMemory:
    """Run a phase without data. The memory of an update includes the gradients of the adapter."""
    if shape.phase == "sampling":
        return _sampling(model, shape, kernels)
    with model.disable_adapter() if shape.phase == "reference" else nullcontext():
        return _scoring(model, shape, kernels)


def _sampling(model: PeftModel, shape: PhaseShape, kernels: DeviceKernels) -> PhaseMemory:
    """Prefill every prompt of a rollout, then decode all of its rows up to their last token."""
    lm = base_of(model)
    prompts = [(row // shape.rows_per_prompt, *[0] * (shape.prompt - 1)) for row in range(shape.rows)]
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    with torch.no_grad(), MemoryCounter() as counter, kernels.emulated():
        states = prefill_prompts(lm, prompts, META, {}, **options)
        logits_BV = states.logits_PV[[states.row_of[prompt] for prompt in prompts]]
        # Decoding reads the values of its bookkeeping, on the device of the logits: it must not be the meta device.
        on_cpu = PrefilledPrompts(caches=states.caches, row_of=states.row_of, logits_PV=torch.empty(0))
        run_step = run_uncaptured if kernels.device_type == "cuda" else None
        decode_batch = start_decoding(
            lm, on_cpu, prompts, range(shape.rows), max_new_tokens=shape.completion, run_step=run_step
        )
        before_decoding = counter.peak
        del states, on_cpu
        counter.peak = counter.live
        _fill_cache(decode_batch, shape.completion - 1)
        with stacked_lora(lm):  # its copies are held until the last step
            logits_BV, _ = decode_batch.step(lm, torch.zeros(shape.rows, dtype=torch.long), **options)
        tempered = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
        ids = torch.zeros(shape.rows, 1, dtype=torch.long)
        rows_B = torch.arange(shape.rows)  # as soon as a row has left, its noise is separated from that of the others
        draw(logits_BV, rows_B, ids, tempered, temperature=0.5, do_sample=True)
        cache_bytes = sum(_bytes(layer) for layer in decode_batch._cache.layers)
    return PhaseMemory(cache=cache_bytes, without_head=counter.peak, before_decoding=before_decoding)


def _fill_cache(decode_batch: DecodeBatch, tokens: int) -> None:
    """Grow the KV cache as if every row had decoded `tokens` tokens."""
    width = max(map(len, decode_batch._slots))
    if isinstance(decode_batch, FixedDecodeBatch):
        decode_batch._tokens += tokens * width
        return
    left = tokens * width
    while left > 0:
        new = min(left, max(width, MIN_GROWTH, decode_batch._cache.get_seq_length() // GROWTH_DIVISOR))
        for layer in decode_batch._cache.layers:
            if getattr(layer, "keys", None) is not None:
                keys, values = (_empty_tokens(states, new) for states in (layer.keys, layer.values))
                layer.update(keys, values)
        left -= new
    decode_batch._owners_RT = F.pad(decode_batch._owners_RT, (0, tokens * width))


def _empty_tokens(states: Tensor, tokens: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], tokens, states.shape[-1])


def _bytes(layer: Any) -> int:
    """Bytes of the storages behind the states of one layer of a cache."""
    names = ("keys", "values")
    tensors = [getattr(layer, name) for name in names if getattr(layer, name, None) is not None]
    for name in ("conv_states", "recurrent_states"):
        tensors += [state for state in getattr(layer, name, {}).values() if state is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _any_loss(scores: Scores) -> Tensor:
    """A loss whose gradient flows through all scores of an update."""
    assert scores.entropies_BC is not None
    return (scores.logps_BC + scores.entropies_BC).sum()


def _scoring(model: PeftModel, shape: PhaseShape, kernels: DeviceKernels) -> PhaseMemory:
    """The update on a micro-batch, or the reference pass over a rollout."""
    lm = base_of(model)
    with_graph = shape.phase == "update"
    in_chunks = with_graph and shape.chunk_tokens is not None
    per_prompt = shape.rows_per_prompt
    siblings = [
        Siblings(
            ((i, *[0] * (shape.prompt - 1)),),
            tuple(range(i * per_prompt, (i + 1) * per_prompt)),
            (shape.completion,) * per_prompt,
            (0,) * per_prompt,
        )
        for i in range(shape.prompts)
    ]
    with MemoryCounter() as counter, kernels.emulated(), META:
        rows = ScoringBatch(
            completion_ids_BC=torch.zeros(shape.rows, shape.completion, dtype=torch.long),
            groups=siblings,
            temperatures=[1.0] * shape.rows,
            max_rows=shape.max_rows,
            chunk_tokens=shape.chunk_tokens,
            with_entropies=with_graph,
            loss=_any_loss,
        )
        head = _RecordingHead(lm=lm, softcap=None, scale=1.0, counter=counter)
        with torch.set_grad_enabled(with_graph):
            scores = loss_in_chunks(lm, rows, head, kernels.emulated) if in_chunks else score(lm, rows, head)
        if with_graph:
            loss = _any_loss(scores) if scores.loss_gradient is None else scores.loss_gradient
            loss.backward()
    model.zero_grad()
    states = prefill(lm, torch.zeros(1, shape.prompt, dtype=torch.long, device=META))
    cache_bytes = sum(map(_bytes, states.layers)) if states else 0
    workspaces = {call: kernels.head_workspace(lm, call) for call in counter.live_at}
    worst = max(workspaces, key=lambda call: counter.live_at[call] + workspaces[call])
    return PhaseMemory(
        cache=cache_bytes * shape.prompts_per_forward,
        without_head=counter.peak,
        with_head=counter.live_at[worst] + workspaces[worst],
        head_workspace=workspaces[worst],
    )
