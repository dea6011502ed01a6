"""After an out-of-memory error: scores and gradients of a batch that had the smaller chunks from the start, and
transformers' tokens."""

import copy

import pytest
import torch

from grpo_ext import GRPOExtTrainer
from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.out_of_memory import is_out_of_memory
from tests.engine.test_loss_in_chunks import adapter_gradients, loss_of
from tests.tools.architectures import random_model
from tests.tools.metrics import comparable
from tests.tools.models import random_lora
from tests.tools.replay import record
from tests.tools.scoring import padded_batch, prompts_of, scoring_batch_of
from tests.tools.training import adapter_of


class Full:
    """A context in which memory is too small for a forward of more than `limit` tokens, `times` in all.

    Args:
        in_decoding: count forwards of up to 4 tokens per row only.
        in_backward: fail in the backward of these forwards.
    """

    def __init__(self, model, limit, times=10**6, *, in_decoding=False, in_backward=False):
        self._in_backward = in_backward
        self._backbone, self._limit, self._left, self.refused = model.get_base_model().base_model, limit, times, 0
        self._longest = 4 if in_decoding else 10**6

    def __enter__(self):
        if self._in_backward:
            self._hook = self._backbone.register_forward_hook(self._allocate_later, with_kwargs=True)
        else:
            self._hook = self._backbone.register_forward_pre_hook(self._allocate, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self._hook.remove()

    def _allocate(self, module, args, kwargs):
        ids = kwargs["input_ids"]
        if ids.numel() > self._limit and ids.size(1) <= self._longest and self._left:
            self._left -= 1
            self.refused += 1
            torch.empty(10**15)  # more than any machine has

    def _allocate_later(self, module, args, kwargs, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda grad: self._allocate(module, args, kwargs))


@pytest.fixture(scope="module")
def llama():
    return random_model("llama", dtype=torch.float32)


def scored(model, **settings):
    """Scores of a batch, and the gradients of its loss."""
    scores = model(scoring_batch=scoring_batch_of(*padded_batch(), loss=loss_of, **settings))
    return scores, adapter_gradients(model, scores.loss_gradient)


# Forwards of the whole batch: 149 and 89 tokens of prompts, 29 and 20 tokens of completions.
@pytest.mark.parametrize(("limit", "times"), [(140, 1), (140, 100), (80, 100), (70, 100), (25, 1), (15, 3)])
def test_update(llama, limit, times):
    with Full(llama, limit, times) as full:
        got, gradients = scored(llama)
    assert full.refused
    assert got.chunk_tokens is not None
    want, wanted = scored(llama, chunk_tokens=got.chunk_tokens)
    assert torch.equal(got.logps_BC, want.logps_BC)
    assert torch.equal(got.entropies_BC, want.entropies_BC)
    for name, grad in gradients.items():
        assert torch.equal(grad, wanted[name]), name


@torch.no_grad()
def test_pass_without_gradients(llama):
    with Full(llama, 70) as full:
        got = llama(scoring_batch=scoring_batch_of(*padded_batch()))
    assert full.refused
    want = llama(scoring_batch=scoring_batch_of(*padded_batch(), chunk_tokens=got.chunk_tokens))
    assert torch.equal(got.logps_BC, want.logps_BC)


def test_the_error_is_raised_if_the_smallest_chunks_do_not_fit(llama):
    with Full(llama, 1) as full, pytest.raises(RuntimeError, match="can't allocate memory"):
        scored(llama)
    assert full.refused <= 10


def sampled(model, sampler=None):
    """Sequences of 8 rows on two prompts, and the random state afterwards."""
    ids, mask = prompts_of(40, 40)
    settings = {} if sampler is None else {"custom_generate": sampler}
    torch.manual_seed(0)
    settings |= {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 48}
    return model.generate(input_ids=ids, attention_mask=mask, **settings), torch.get_rng_state()


@pytest.mark.parametrize("capture", [None, record], ids=["growing", "fixed"])
@pytest.mark.parametrize(("limit", "times"), [(6, 1), (4, 100), (3, 100), (1, 100)])
def test_sampling(limit, times, capture):
    """In parts, whose rows end at different times. The next call begins with parts of the size that fitted."""
    model = random_model("llama")
    stock, state = sampled(model)
    sampler = GroupSampler(temperature=0.8, capture=capture)
    with Full(model, limit, times, in_decoding=True) as full:
        for _ in range(2):
            ours, state_after = sampled(model, sampler)
            assert torch.equal(ours, stock)
            assert torch.equal(state_after, state)
            refused = full.refused
    assert 0 < refused == full.refused
    undisturbed = GroupSampler(temperature=0.8)
    sampled(model, undisturbed)
    assert sampler.completions.tokens == undisturbed.completions.tokens
    assert sampler.completions.is_cut == undisturbed.completions.is_cut
    for ours, theirs in zip(sampler.completions.logps, undisturbed.completions.logps, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_single_row_that_does_not_fit(llama):
    with Full(llama, 0, in_decoding=True), pytest.raises(RuntimeError, match="can't allocate memory"):
        sampled(llama, GroupSampler(temperature=0.8))


def test_other_errors_are_raised_at_once(llama):
    calls = []

    def fail(*args):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    hook = llama.get_base_model().base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        scored(llama)
    hook.remove()
    assert len(calls) == 1


def test_a_run_goes_on_with_smaller_chunks(build, small_model, tmp_path, caplog):
    """It reports the size once, saves it, and trains as a run that had it from the start."""

    def train(limit, resume=None, **settings):
        options = {"peft_config": random_lora(), "max_steps": 3, "guards": False, "beta": 0.0} | settings
        options |= {"max_completion_length": 24}
        trainer = build(copy.deepcopy(small_model), save_strategy="steps", save_steps=2, **options)
        with Full(trainer.model, limit) as full:
            trainer.train(resume_from_checkpoint=resume)
        return adapter_of(trainer), full.refused

    adapter, refused = train(60)
    assert refused > 0
    messages = [record.message for record in caplog.records if "Out of memory" in record.message]
    assert len(messages) == 1
    size = int(messages[0].split("chunk_tokens=")[1].rstrip("."))

    _, refused = train(60, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert refused == 0
    planned, _ = train(10**6, chunk_tokens=size, output_dir=str(tmp_path / "planned"))
    for name, value in planned.items():
        assert torch.equal(adapter[name], value), name


class Doubled(GRPOExtTrainer):
    """Its loss is not known to be a sum over rows, so gradients are computed after all scores."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(GRPOExtTrainer, {"loss_type": "grpo", "top_entropy_quantile": 0.5}), (Doubled, {"num_iterations": 2})],
)
def test_a_backward_that_does_not_fit_is_repeated(build, small_model, tmp_path, kind, settings):
    """The adapter and the metrics are those of a run that had the smaller chunks from the start."""

    def train(name, limit, **more):
        options = {"peft_config": random_lora(), "max_steps": 3, "beta": 0.1, "max_completion_length": 24}
        options |= {"temperature_schedule": "entropy", "temperature_entropy_target": 1.0} | settings | more
        trainer = build(copy.deepcopy(small_model), trainer=kind, output_dir=str(tmp_path / name), **options)
        with Full(trainer.model, limit, in_backward=True) as full:
            trainer.train()
        return trainer, full.refused

    repeated, refused = train("repeated", 60)
    assert refused
    size = repeated.parts.scorer.limits.state_dict()["with_graph"]
    planned, refused = train("planned", 10**6, chunk_tokens=size)
    assert refused == 0
    for ours, want in zip(adapter_of(repeated).values(), adapter_of(planned).values(), strict=True):
        assert torch.equal(ours, want)
    paths = (tmp_path / name / "metrics.jsonl" for name in ("repeated", "planned"))
    assert comparable(next(paths)) == comparable(next(paths))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 17.00 GB)",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_every_kind_of_out_of_memory_error_is_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
