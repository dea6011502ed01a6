"""Decoding in fixed buffers with captured steps: the tokens of the loop without them, on a device that can replay."""

import logging
import weakref

import pytest
import torch

from grpo_ext.engine import captured_decode
from grpo_ext.engine.decode import GroupSampler
from tests.tools.architectures import attentions, random_model
from tests.tools.replay import record
from tests.tools.scoring import prompts_of

FIXED_CACHE = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gpt2", "qwen3_moe")  # only `DynamicLayer`s


@pytest.fixture(autouse=True)
def short_buckets(monkeypatch):
    monkeypatch.setattr(captured_decode, "BUCKET_STEPS", 16)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama", "sdpa")


def sample(model, ids, mask, sampler, **settings):
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 48} | settings
    return model.generate(input_ids=ids, attention_mask=mask, custom_generate=sampler, **settings)


@pytest.mark.parametrize("lengths", [(150, 150), (40, 33, 7)], ids=["shared_slots", "ragged"])
@pytest.mark.parametrize(
    ("architecture", "attention"), attentions([("llama", "eager"), ("llama", "sdpa"), ("mistral", "sdpa")])
)
def test_replayed_steps_sample_the_same_tokens(architecture, attention, lengths):
    """A replay reads and writes the addresses of its recording, and depends on no number that Python computes."""
    model = random_model(architecture, attention)
    ids, mask = prompts_of(*lengths)
    plain = GroupSampler(0.8)
    expected, random_state = sample(model, ids, mask, plain), torch.get_rng_state()
    recordings = []

    def capture(step):
        recordings.append(record(step))
        return recordings[-1]

    captured = GroupSampler(0.8, capture=capture)
    tokens = sample(model, ids, mask, captured)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    for row, others in zip(captured.completions.logps, plain.completions.logps, strict=True):
        assert row == pytest.approx(others, abs=2e-6)
    assert (len(recordings) > 2) == (architecture in FIXED_CACHE), "lengths and rows that leave give several shapes"


def test_an_adapter_trained_between_rollouts_is_sampled(llama):
    """What was captured belongs to one rollout: the next one sees weights that were replaced, and holds no memory."""
    ids, mask = prompts_of(40)
    outputs = []

    def capture(step):
        replay = record(step)
        outputs.append(weakref.ref(replay()))
        return replay

    sampler = GroupSampler(0.8, capture=capture)
    sample(llama, ids, mask, sampler)
    assert outputs
    assert all(output() is None for output in outputs)
    adapter = next(p for name, p in llama.named_parameters() if "lora_B" in name)
    before, adapter.data = adapter.data, adapter.data + 1.0
    changed = sample(llama, ids, mask, sampler)
    expected = sample(llama, ids, mask, GroupSampler(0.8))
    adapter.data = before
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("fault", ["no capture", "wrong replay"])
def test_without_a_graph_decoding_goes_on(llama, caplog, fault):
    ids, mask = prompts_of(40, 33)

    def capture(step):
        if fault == "no capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: step() + 1.0

    sampler = GroupSampler(0.8, capture=capture)
    with caplog.at_level(logging.WARNING, logger="grpo_ext"):
        rollouts = [sample(llama, ids, mask, sampler) for _ in range(2)]
    expected = sample(llama, ids, mask, GroupSampler(0.8))
    assert all(torch.equal(tokens, expected) for tokens in rollouts)
    reason = {"no capture": "not permitted when stream is capturing", "wrong replay": "not close"}[fault]
    assert [reason in message for message in caplog.messages] == [True], "one message with the reason"


def test_a_capture_that_runs_out_of_memory_is_tried_with_fewer_rows(llama, caplog):
    """Graphs stay on: the sampler draws the rows in two halves."""
    ids, mask = prompts_of(40, 33)
    failed = []

    def capture(step):
        if not failed:
            failed.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(step)

    with caplog.at_level(logging.WARNING, logger="grpo_ext"):
        tokens = sample(llama, ids, mask, GroupSampler(0.8, capture=capture))
    assert torch.equal(tokens, sample(llama, ids, mask, GroupSampler(0.8)))
    assert not [message for message in caplog.messages if "one by one" in message]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_cuda_graph_that_cannot_be_made(llama, caplog):
    ids, mask = prompts_of(40)
    sampler = GroupSampler(0.8, capture=captured_decode.capture_cuda_graph)
    with caplog.at_level(logging.WARNING, logger="grpo_ext"):
        tokens = sample(llama, ids, mask, sampler)
    assert torch.equal(tokens, sample(llama, ids, mask, GroupSampler(0.8)))
    assert len(caplog.messages) == 1
