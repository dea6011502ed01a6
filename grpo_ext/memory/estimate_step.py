"""A training step without data: the engine itself runs on the meta device while a `Tally` counts what its tensors hold.

In: a policy from `skeleton.py` and what a step computes (`passes.py`). Out: bytes at most in each phase, beside weights
and optimizer.
What is kept, copied and freed is decided by the code that trains, so nothing of it is written down here a second time;
what differs by device stands in `device_kernels.py`.

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

from grpo_ext.engine.batch import ScoringBatch, Siblings
from grpo_ext.engine.decode import GroupSampler, PrefilledPrompts, prefill_prompts, start_decoding
from grpo_ext.engine.decode_cache import DecodeBatch
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.prefill import prefill
from grpo_ext.engine.score import score
from grpo_ext.engine.score_chunked import score_in_chunks
from grpo_ext.memory.counter import Tally
from grpo_ext.memory.device_kernels import HeadPass, Kernels
from grpo_ext.memory.step_shapes import Pass
from grpo_ext.model.unwrap import base_of

META = torch.device("meta")
# Tokens, and parts of what is there, that a lane grows by at once here; the sampler adds token by token.
GROWTH = (64, 16)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes that a phase of a step holds at most.

    Attributes:
        states: keys and values (or recurrent states) of the prompts; in sampling, of prompts and completions.
        without_head, with_head: everything, at the worst moment without and with the LM head at work.
        tile: what the head takes for itself at that moment.
    """

    states: float
    without_head: float
    with_head: float = 0
    tile: float = 0

    @property
    def total(self) -> float:
        return max(self.without_head, self.with_head)

    @property
    def head(self) -> float:
        """The head's share of the total: none where the worst moment is another one."""
        return self.tile if self.with_head >= self.without_head else 0

    @property
    def rest(self) -> float:
        return self.total - self.head - self.states

    def stretched(self, longer: "Phase", times: float) -> "Phase":
        """This phase in a model with more layers: by what the step to `longer` adds, so many times."""

        def line(name: str) -> float:
            start = getattr(self, name)
            return start + times * (getattr(longer, name) - start)

        return Phase(**{field.name: line(field.name) for field in fields(Phase)})


@dataclass(frozen=True, kw_only=True)
class _MarkingHead(TiledHead):
    """Does nothing but mark when the LM head is at work, and on how many tokens."""

    tally: Tally

    def score(
        self, hidden_TH: Tensor, targets_T: Tensor, temperature: float, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        logps_T, entropies_T = _MarkedScore.apply(hidden_TH, self.tally, with_entropies)
        return logps_T, entropies_T if with_entropies else None


class _MarkedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, tally: Tally, with_entropies: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TH)
        ctx.tally, ctx.with_entropies = tally, with_entropies
        tally.mark(HeadPass(tokens=len(hidden_TH), with_entropies=with_entropies, backward=False))
        scores_T = hidden_TH.new_empty(len(hidden_TH), dtype=torch.float32)
        return scores_T, scores_T.clone()

    @staticmethod
    def backward(ctx: Any, *grads_T: Tensor) -> Any:
        (hidden_TH,) = ctx.saved_tensors
        ctx.tally.mark(HeadPass(tokens=len(hidden_TH), with_entropies=ctx.with_entropies, backward=True))
        return torch.empty_like(hidden_TH), None, None


def rehearse(model: PeftModel, passed: Pass, kernels: Kernels) -> Phase:
    """A phase of a step; the gradients of the update count."""
    if passed.phase == "sampling":
        return _sampling(model, passed, kernels)
    with model.disable_adapter() if passed.phase == "reference" else nullcontext():
        return _scoring(model, passed, kernels)


def _sampling(model: PeftModel, passed: Pass, kernels: Kernels) -> Phase:
    """Every prompt of a rollout is read, its rows are decoded side by side, up to their last token."""
    lm = base_of(model)
    prompts = [(row // passed.each, *[0] * (passed.prompt - 1)) for row in range(passed.rows)]
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    sampler = GroupSampler(temperature=1.0)
    with torch.no_grad(), Tally() as tally, kernels.functions():
        states = prefill_prompts(lm, prompts, META, {}, **options)
        logits_BV = states.logits_PV[[states.row_of[prompt] for prompt in prompts]]
        # The bookkeeping of lanes reads values: it goes by the device of the logits.
        on_cpu = PrefilledPrompts(caches=states.caches, row_of=states.row_of, logits_PV=torch.empty(0))
        lanes = start_decoding(lm, on_cpu, prompts, max_new_tokens=passed.completion)
        del states, on_cpu
        _fill(lanes, passed.completion - 1)
        _, logits = lanes.step(lm, torch.zeros(passed.rows, dtype=torch.long), **options)
        logits_BV = torch.zeros_like(logits)
        tempered = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
        sampler._sample_tokens(torch.zeros(passed.rows, 1, dtype=torch.long), logits_BV, tempered, True)
        held = sum(_bytes(layer) for layer in lanes._cache.layers)
    return Phase(states=held, without_head=tally.peak)


def _fill(lanes: DecodeBatch, tokens: int) -> None:
    """Let every row of the lanes have so many tokens, as far as memory goes."""
    width = max(map(len, lanes._slots))
    left = tokens * width
    while left > 0:
        new = min(left, max(width, GROWTH[0], lanes._cache.get_seq_length() // GROWTH[1]))
        for layer in lanes._cache.layers:
            if getattr(layer, "keys", None) is not None:
                keys, values = (_tokens_of(states, new) for states in (layer.keys, layer.values))
                layer.update(keys, values)
        left -= new
    lanes._owners_RT = F.pad(lanes._owners_RT, (0, tokens * width))


def _tokens_of(states: Tensor, tokens: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], tokens, states.shape[-1])


def _bytes(layer: Any) -> int:
    """Of the storages behind the states of a cache's layer."""
    names = ("keys", "values")
    tensors = [getattr(layer, name) for name in names if getattr(layer, name, None) is not None]
    for name in ("conv_states", "recurrent_states"):
        tensors += [state for state in getattr(layer, name, {}).values() if state is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _scoring(model: PeftModel, passed: Pass, kernels: Kernels) -> Phase:
    """The update of a micro-batch, or the reference pass over a rollout."""
    lm = base_of(model)
    with_graph = passed.phase == "update"
    in_chunks = with_graph and passed.chunk_tokens is not None
    each = passed.each
    siblings = [
        Siblings(
            ((i, *[0] * (passed.prompt - 1)),),
            tuple(range(i * each, (i + 1) * each)),
            (passed.completion,) * each,
            (0,) * each,
        )
        for i in range(passed.prompts)
    ]
    with Tally() as tally, kernels.functions(), META:
        rows = ScoringBatch(
            completion_ids_BC=torch.zeros(passed.rows, passed.completion, dtype=torch.long),
            groups=siblings,
            temperatures=[1.0] * passed.rows,
            max_rows=passed.max_rows,
            chunk_tokens=passed.chunk_tokens,
            with_entropies=with_graph,
        )
        head = _MarkingHead(lm=lm, softcap=None, scale=1.0, tally=tally)
        with torch.set_grad_enabled(with_graph):
            scores = score_in_chunks(lm, rows, head, kernels.functions) if in_chunks else score(lm, rows, head)
        if with_graph:
            assert scores.entropies_BC is not None
            torch.autograd.backward([scores.logps_BC, scores.entropies_BC], [torch.empty_like(scores.logps_BC)] * 2)
    model.zero_grad()
    states = prefill(lm, torch.zeros(1, passed.prompt, dtype=torch.long, device=META))
    held = sum(map(_bytes, states.layers)) if states else 0
    tiles = {at_work: kernels.tile(lm, at_work) for at_work in tally.marked}
    worst = max(tiles, key=lambda at_work: tally.marked[at_work] + tiles[at_work])
    return Phase(
        states=held * passed.at_once,
        without_head=tally.peak,
        with_head=tally.marked[worst] + tiles[worst],
        tile=tiles[worst],
    )
