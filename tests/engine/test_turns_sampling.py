"""Sampling turn by turn on kept caches, against recomputing the whole history for every token."""

import pytest
import torch

from grpo_ext.engine import captured_decode
from grpo_ext.engine.batch import strip_padding
from grpo_ext.engine.decode import GroupSampler
from tests.tools.architectures import EOS, random_model
from tests.tools.replay import record
from tests.tools.scoring import prompts_of

TEMPERATURE, MAX_TURN_TOKENS = 0.8, 12


def observation(tokens):
    """The environment's reply to a turn, 1 to 5 tokens derived from it; None if the episode ends."""
    return None if sum(tokens) % 7 == 0 else [2 + (sum(tokens) + i) % 50 for i in range(1 + len(tokens) % 5)]


def play(sample, prompts, turns=3):
    """Tokens and log-probs of every row, turn by turn; `sample(histories, limits)` gives both for one turn."""
    histories = [list(prompt) for prompt in prompts]
    sampled = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for turn in range(turns):
        limits = [MAX_TURN_TOKENS - 3 * turn - row % 3 for row in active]
        tokens, logps = sample([histories[row] for row in active], limits)
        replies = dict(zip(active, map(observation, tokens), strict=True))
        for row, ids, values in zip(active, tokens, logps, strict=True):
            sampled[row].append((ids, values))
            histories[row] += ids
        # One row in four ends a turn earlier than the others, whatever its tokens.
        active = [row for row in active if replies[row] is not None and turn < turns - 1 - (row % 4 == 3)]
        for row in active:
            histories[row] += replies[row]
    return sampled, histories


def padded(histories):
    longest = max(map(len, histories))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in histories])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in histories])


def shared_turns(model, sampler):
    """Turns from the sampler under test; the caller seeds it once, before the first turn."""

    def sample(histories, limits):
        sampler.max_new_tokens_per_row = limits
        ids, mask = padded(histories)
        settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": 24}
        model.generate(input_ids=ids, attention_mask=mask, custom_generate=sampler, **settings)
        return sampler.completions.tokens, sampler.completions.logps

    return sample


def slow_turns(model):
    """The obvious way: for every token, run every active row from its first token, alone and without padding."""

    def sample(histories, limits):
        tokens, logps = [[] for _ in histories], [[] for _ in histories]
        active = [True] * len(histories)
        while any(active):
            logits = torch.zeros(len(histories), 61)
            for row, history in enumerate(histories):
                if active[row]:
                    logits[row] = model(input_ids=torch.tensor([history + tokens[row]])).logits[0, -1].float()
            scores = logits / TEMPERATURE
            chosen = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            for row in range(len(histories)):
                if active[row]:
                    tokens[row].append(chosen[row].item())
                    logps[row].append(scores.log_softmax(-1)[row, chosen[row]].item())
                    active[row] = tokens[row][-1] != EOS and len(tokens[row]) < limits[row]
        return tokens, logps

    return sample


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((60, 60, 33, 1), id="ragged"),
        pytest.param((60, 60), id="siblings in slots", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("architecture", "capture"),
    [
        ("llama", None),
        pytest.param("llama", record, id="llama, captured"),
        *[
            pytest.param(name, None, marks=pytest.mark.slow)
            for name in ("mistral", "gemma3", "gemma2", "lfm2", "qwen3_5_text", "falcon_h1")
        ],
    ],
)
@torch.no_grad()
def test_kept_caches_equal_recomputed_histories(monkeypatch, architecture, lengths, capture):
    """Tokens and log-probs of three turns. Rows end at different times, turns and observations have different lengths,
    and with long prompts siblings share slots in the first turn. A window of 40 tokens, a convolution or a recurrent
    state that is lost or padded between turns would change the results."""
    monkeypatch.setattr(captured_decode, "BUCKET_STEPS", 4)
    model = random_model(architecture, "eager" if architecture == "gemma2" else "sdpa")
    prompts = strip_padding(*prompts_of(*lengths, siblings=3))
    torch.manual_seed(0)
    slow, _ = play(slow_turns(model), prompts)
    sampler = GroupSampler(TEMPERATURE, capture=capture)
    torch.manual_seed(0)
    with sampler.keep_row_caches():
        ours, _ = play(shared_turns(model, sampler), prompts)
    for row, (turns, wanted) in enumerate(zip(ours, slow, strict=True)):
        assert [ids for ids, _ in turns] == [ids for ids, _ in wanted], row
        for (_, logps), (_, wanted_logps) in zip(turns, wanted, strict=True):
            assert logps == pytest.approx(wanted_logps, abs=2e-6)
    assert len({len(turns) for turns in ours}) > 1


@torch.no_grad()
def test_every_token_is_run_once():
    """The embedding sees each distinct prompt once, and all tokens of a row except the last one. Without kept caches,
    every turn runs its whole history again."""
    model = random_model("llama", "sdpa")
    prompts = strip_padding(*prompts_of(60, 9, siblings=4))
    counted = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, inputs, out: counted.append(inputs[0].numel()))
    sampler = GroupSampler(TEMPERATURE)
    torch.manual_seed(0)
    with sampler.keep_row_caches():
        kept, histories = play(shared_turns(model, sampler), prompts)
    tokens = sum(counted)
    assert sampler._kept_rows == {}
    assert tokens == 60 + 9 + sum(len(row) - len(prompt) - 1 for row, prompt in zip(histories, prompts, strict=True))
    counted.clear()
    torch.manual_seed(0)
    assert [[ids for ids, _ in row] for row in play(shared_turns(model, sampler), prompts)[0]] == [
        [ids for ids, _ in row] for row in kept
    ]
    hook.remove()
    assert sum(counted) > 2 * tokens
