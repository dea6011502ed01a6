"""Sampling and scoring on a second device, which a CPU simulates: the results of the CPU, no operation that mixes
devices, and ceilings on host syncs and kernel launches.

On a GPU, a small model waits for its launches, and each host sync keeps the program from launching ahead. A ceiling
that is exceeded means that a step got slower there, although no result changed. If a number falls, lower its ceiling,
and the table in tests/benchmarks/README.md. `pytest -rP` prints all counts by line.
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils

from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.scorer import Scorer, ScoringPass, ScoringRequest
from tests.tools.architectures import EOS, TEMPERATURE, TINY, random_model
from tests.tools.lanes import slow_but
from tests.tools.scoring import padded_batch, prompts_of
from tests.tools.second_device import SecondDevice

CPU = torch.device("cpu")
NEVER = TINY["vocab_size"]  # an end-of-sequence id that is never sampled

# Host syncs of one call of `generate`. TOKENS_PER_SYNC: sampled tokens per look at which rows have ended.
TOKENS_PER_SYNC = 8
SYNCS_PER_CALL = 24
SYNCS_PER_PROMPT_LENGTH = 2  # prompts of equal length share a prefill
SYNCS_PER_DEPARTURE = 5  # the batch is rearranged when rows leave it


class Model(NamedTuple):
    """A llama with two query heads per head of keys and values."""

    has_lora: bool
    in_bfloat16: bool  # the frozen weights, and autocast

    def __str__(self) -> str:
        return f"{'LoRA' if self.has_lora else 'no adapter'}, {'bfloat16' if self.in_bfloat16 else 'float32'}"

    def build(self, layers: int = 2) -> torch.nn.Module:
        model = random_model("llama", "sdpa", torch.float32, num_hidden_layers=layers)
        if not self.has_lora:
            model = model.unload()
        for parameter in model.parameters():
            if self.in_bfloat16 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return model

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.in_bfloat16)


LORA, LORA_16, NO_ADAPTER = Model(True, False), Model(True, True), Model(False, False)


@pytest.fixture
def device():
    with SecondDevice() as device:
        yield device


# The device itself


@pytest.mark.parametrize(
    ("syncs", "launches", "action"),
    [
        (0, 1, lambda x: x + 1),
        (0, 1, lambda x: x.add_(torch.tensor(2.0))),  # a scalar on the CPU is an argument of the kernel
        (0, 0, lambda x: x.view(4)[1:].unsqueeze(0).expand(3, 3)),
        (0, 0, torch.empty_like),
        (0, 0, lambda x: x.to(x.device, x.dtype)),
        (0, 1, lambda x: x.to(torch.bfloat16)),
        (1, 0, lambda x: x[0, 0].item()),
        (1, 0, lambda x: x.tolist()),
        (1, 0, lambda x: x.cpu()),
        (1, 0, lambda x: torch.tensor([1, 2], device=x.device)),
        (1, 0, lambda x: torch.ones(3).to(x.device)),
        (0, 1, lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True)),
        (0, 0, lambda x: torch.tensor([], device=x.device)),
        (1, 1, lambda x: x[[1, 0]]),
        (1, 1, lambda x: x[torch.tensor([1, 0])]),
        (1, 2, lambda x: x[x > 1]),
        (1, 2, lambda x: bool((x > 1).any())),
        (1, 1, torch.nonzero),
        (1, 1, lambda x: torch.equal(x, x)),
        (1, 3, lambda x: x.repeat_interleave(x.long()[0], dim=0)),
        (0, 1, lambda x: x.repeat_interleave(2, dim=0)),
    ],
)
def test_what_is_counted(device, syncs, launches, action):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device.torch_device)
    with device.counting() as counts:
        action(x)
    assert (counts.syncs.total(), counts.launches.total()) == (syncs, launches), counts.report()


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x + torch.ones(2, 2),
        lambda x: torch.ones(2, 2) @ x,
        lambda x: torch.cat([x, torch.ones(2, 2)]),
        lambda x: torch.ones(2, 2)[x.long()],
        lambda x: torch.tensor(1.0).add_(x.sum()),
    ],
)
def test_mixed_devices_raise_an_error(device, action):
    x = torch.zeros(2, 2, device=device.torch_device)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        action(x)
    assert device.counts.mixed.total() == 1


def test_no_device_is_left_behind():
    """Otherwise every later trainer in this process would be put on it."""
    with SecondDevice() as device:
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    with pytest.raises(NotImplementedError):
        torch.ones(1, device=device.torch_device)


def test_trainable_weights_are_cast_once_per_autocast(device):
    x = torch.ones(2, 2, device=device.torch_device)
    weight = torch.ones(2, 2, device=device.torch_device, requires_grad=True)
    for _ in range(2):
        with device.counting() as counts, LORA_16.autocast(device.torch_device):
            for _ in range(3):
                assert (x @ weight).dtype == torch.bfloat16
                assert x.bfloat16().softmax(dim=-1).dtype == torch.float32
        casts = sum(count for event, count in counts.launches.items() if "_to_copy" in event.operation)
        assert casts == 3 + 1 + 3 * 2


# Sampling


def sample(model, setting, where, ids, mask, tokens, eos):
    """The sampled tokens, and the random state after the draws."""
    sampler = GroupSampler(TEMPERATURE)
    torch.manual_seed(0)
    with setting.autocast(where):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=tokens,
            eos_token_id=eos,
            custom_generate=sampler,
        )
    return sampler.completions.tokens, torch.get_rng_state()


def most_syncs(tokens, prompt_lengths, departures):
    """The ceiling of one call: `departures` is how often rows leave before the last ones end."""
    return (
        SYNCS_PER_CALL
        + SYNCS_PER_PROMPT_LENGTH * len(set(prompt_lengths))
        + SYNCS_PER_DEPARTURE * departures
        + -(-tokens // TOKENS_PER_SYNC)
    )


@pytest.mark.parametrize(
    ("model", "prompt_lengths", "packing"),
    slow_but(
        [
            (model, prompt_lengths, packing)
            for model in (LORA, LORA_16, NO_ADAPTER)
            for prompt_lengths, packing in (((40, 30), "packed"), ((12, 12), "unpacked"), ((12, 7), "unpacked"))
        ],
        [(LORA_16, (40, 30), "packed"), (NO_ADAPTER, (12, 7), "unpacked")],
    ),
    ids=str,
)
def test_sampling(device, model, prompt_lengths, packing):
    """Four siblings per prompt, two per slot if they are packed. With these seeds, no draw is so close that rounding
    decides it."""
    ids, mask = prompts_of(*prompt_lengths)
    lm = model.build()
    expected, random_state = sample(lm, model, CPU, ids, mask, 12, EOS)
    lm.to(device.torch_device)
    ids, mask = ids.to(device.torch_device), mask.to(device.torch_device)
    with device.counting() as counts:
        tokens, random_state_after = sample(lm, model, device.torch_device, ids, mask, 12, EOS)
    assert tokens == expected
    assert torch.equal(random_state_after, random_state)
    assert not counts.mixed
    print(counts.report())
    lengths = {len(row) for row in tokens}
    assert len(lengths) > 1, "no row ended before another"
    assert counts.syncs.total() <= most_syncs(12, prompt_lengths, len(lengths) - 1)


# Kernel launches per sampled token: of each layer, and of everything else.
LAUNCHES_PER_TOKEN = {
    (LORA, "packed"): (54, 55),
    (LORA, "unpacked"): (52, 54),
    (LORA_16, "packed"): (63, 60),
    (LORA_16, "unpacked"): (61, 59),
    (NO_ADAPTER, "packed"): (43, 55),
    (NO_ADAPTER, "unpacked"): (41, 54),
}
PROMPTS = {"packed": (64, 64), "unpacked": (7, 7)}  # four siblings share a slot for up to 16 tokens


def rates(count, small, large):
    """What one unit of work costs: in each layer, and apart from the layers. `count(layers, units)` may include
    anything that depends on neither, which the differences remove."""
    of_units = {layers: (count(layers, large) - count(layers, small)) / (large - small) for layers in (1, 2)}
    per_layer = of_units[2] - of_units[1]
    return per_layer, of_units[1] - per_layer


@pytest.mark.parametrize(
    ("model", "packing"),
    slow_but(LAUNCHES_PER_TOKEN, [(LORA_16, "packed"), (NO_ADAPTER, "unpacked")]),
    ids=str,
)
def test_launches_and_syncs_per_sampled_token(device, model, packing):
    """No row ends before the limit, so every token costs the same."""
    ids, mask = (tensor.to(device.torch_device) for tensor in prompts_of(*PROMPTS[packing]))
    models = {layers: model.build(layers).to(device.torch_device) for layers in (1, 2)}

    def count(layers, tokens):
        with device.counting() as counts:
            sample(models[layers], model, device.torch_device, ids, mask, tokens, NEVER)
        syncs = counts.syncs.total()
        assert syncs <= most_syncs(tokens, PROMPTS[packing], 0), counts.report()
        return counts.launches.total()

    per_layer, rest = rates(count, 8, 16)
    print(f"{model}, {packing}: {per_layer:g} launches per token and layer, {rest:g} more per token")
    assert per_layer <= LAUNCHES_PER_TOKEN[model, packing][0]
    assert rest <= LAUNCHES_PER_TOKEN[model, packing][1]


# Scoring


def score(model, setting, where, ids, mask, C, chunk_tokens):
    """Log-probs and the gradient of every adapter tensor, on the CPU."""
    scorer = Scorer(
        shares_prompts=True,
        requires_sharing=False,
        experts_per_token=None,
        autocast=lambda: setting.autocast(where),
    )
    request = ScoringRequest(
        scoring_pass=ScoringPass.UPDATE,
        input_ids_BT=ids,
        attention_mask_BT=mask,
        completion_tokens=C,
        temperatures=[TEMPERATURE] * len(ids),
        chunk_tokens=chunk_tokens,
        loss=lambda scores: scores.logps_BC.sum(),
    )
    scores = scorer(model, request, plain=pytest.fail)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return scores.logps_BC, torch.autograd.grad(scores.loss_gradient, trainable)


@pytest.mark.parametrize("chunk_tokens", slow_but([20, 60, 130], [130]))  # of a prompt, one row each, several rows
@pytest.mark.parametrize(("model", "bound"), [(LORA, 1e-5), (LORA_16, 0.1)], ids=str)
def test_chunked_scoring(device, model, bound, chunk_tokens):
    """Log-probs in nats, and gradients relative to their norm, are those of the CPU up to rounding."""
    ids, mask, C = padded_batch((40, 30), ((12, 7, 1, 9), (5, 12, 0, 3)))
    lm = model.build()
    expected = score(lm, model, CPU, ids, mask, C, chunk_tokens)
    lm.to(device.torch_device)
    ids, mask = ids.to(device.torch_device), mask.to(device.torch_device)
    logps_BC, grads = score(lm, model, device.torch_device, ids, mask, C, chunk_tokens)
    assert not device.counts.mixed
    torch.testing.assert_close(logps_BC.cpu(), expected[0], atol=bound, rtol=0)
    for grad, wanted in zip(grads, expected[1], strict=True):
        assert (grad.cpu() - wanted).norm() < bound * wanted.norm()


@pytest.fixture
def flash_attention(monkeypatch):
    """The functions of the package flash-attn, computed by PyTorch; the ends of the sequences that they were given."""
    ends = []

    def attend(query, key, value, **options):
        """Shapes (B, T, heads, D); the last query sees the last key."""
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        sees = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device)
        sees = sees.tril(key.size(2) - query.size(2))
        return scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True).transpose(1, 2)

    def attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        """Shapes (T, heads, D); here always one sequence."""
        assert (len(query), len(key)) == (max_seqlen_q, max_seqlen_k)
        ends.extend([(cu_seqlens_q, len(query)), (cu_seqlens_k, len(key))])
        return attend(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))[0]

    def arguments(**options):
        return {name: options[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in options}

    functions = (attend, attend_packed, None, None, None), (arguments, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: functions)
    return ends


@pytest.mark.parametrize("chunk_tokens", [20, 60])
def test_flash_attention_knows_the_lengths(device, flash_attention, chunk_tokens):
    """Otherwise, the host waits in every layer of every forward of one row."""
    ids, mask, C = padded_batch((40, 30), ((12, 7, 1, 9), (5, 12, 0, 3)))
    there = ids.to(device.torch_device), mask.to(device.torch_device)
    syncs = {}
    for layers in (1, 3):
        lm = LORA.build(layers)
        expected, _ = score(lm, LORA, CPU, ids, mask, C, chunk_tokens)
        lm.get_base_model().config._attn_implementation = "flash_attention_2"
        lm.to(device.torch_device)
        with device.counting() as counts:
            logps_BC, _ = score(lm, LORA, device.torch_device, *there, C, chunk_tokens)
        torch.testing.assert_close(logps_BC.cpu(), expected, atol=1e-5, rtol=0)
        syncs[layers] = counts.syncs.total()
    assert syncs[3] == syncs[1], counts.report()
    assert flash_attention
    assert all(ends.tolist() == [0, length] for ends, length in flash_attention)


# Kernel launches of one chunk, forward and backward: of each layer, and of everything else.
LAUNCHES_PER_CHUNK = {
    (LORA, "one row"): (208, 80),
    (LORA_16, "one row"): (265, 89),
    (LORA_16, "two packed rows"): (256, 91),
}


@pytest.mark.parametrize(("model", "chunk"), slow_but(LAUNCHES_PER_CHUNK, [(LORA_16, "two packed rows")]), ids=str)
def test_launches_and_syncs_per_scored_chunk(device, model, chunk):
    """One prompt of 20 tokens, and completions of 5."""
    rows = 1 if chunk == "one row" else 2
    models = {layers: model.build(layers).to(device.torch_device) for layers in (1, 2)}
    syncs = {}

    def count(layers, chunks):
        ids, mask, C = padded_batch((20,), ((5,) * chunks * rows,))
        ids, mask = ids.to(device.torch_device), mask.to(device.torch_device)
        with device.counting() as counts:
            score(models[layers], model, device.torch_device, ids, mask, C, 25 * rows)
        syncs[layers, chunks] = counts.syncs.total()
        return counts.launches.total()

    per_layer, rest = rates(count, 2, 4)
    syncs_per_chunk = (syncs[2, 4] - syncs[2, 2]) / 2
    print(f"{model}, {chunk}: {syncs_per_chunk:g} host syncs per chunk")
    print(f"{model}, {chunk}: {per_layer:g} launches per chunk and layer, {rest:g} more per chunk")
    assert syncs_per_chunk == 0
    assert per_layer <= LAUNCHES_PER_CHUNK[model, chunk][0]
    assert rest <= LAUNCHES_PER_CHUNK[model, chunk][1]
