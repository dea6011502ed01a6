"""Each named algorithm against the formula of its paper: advantages, loss and gradient, worked out in float64.

Fixed rewards and log-ratios give values inside and outside of every clipping range. Completions of the embedded
model differ in length, and some are cut off.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev

import pytest
import torch

from grpo_ext import GRPOExtConfig, algorithm, overlong_punishment
from grpo_ext.algorithms import ALGORITHMS
from tests.tools.models import random_lora

G, LONGEST = 4, 16
REWARDS = [1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.25]
PROMPTS = ["Question: 538+478=?\nAnswer:", "Question: 111+222=?\nAnswer:"]


@dataclass
class Row:
    """A completion: its advantage; for each of its tokens the log-probs under policy, old policy and reference, and the
    entropy. Empty lists for a completion that is excluded from the loss."""

    A: float
    new: list[float]
    old: list[float]
    ref: list[float]
    entropies: list[float]

    @property
    def ratios(self):
        return [math.exp(new - old) for new, old in zip(self.new, self.old, strict=True)]

    @property
    def kls(self):
        return [math.exp(ref - new) - (ref - new) - 1 for ref, new in zip(self.ref, self.new, strict=True)]


def surrogate(ratio, A, low, high):
    return min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)


def deepseek(rows):
    objectives = [
        surrogate(math.prod(row.ratios), row.A, 0.2, 0.2)
        - 0.1 * sum(ratio * kl for ratio, kl in zip(row.ratios, row.kls, strict=True))
        + 0.01 * fmean(row.entropies)
        for row in rows
    ]
    return -fmean(objectives)


def grpo(rows):
    return -fmean(
        fmean(surrogate(r, row.A, 0.2, 0.2) - 0.04 * kl for r, kl in zip(row.ratios, row.kls, strict=True))
        for row in rows
    )


def dapo(rows):
    return -fmean(surrogate(ratio, row.A, 0.2, 0.28) for row in rows for ratio in row.ratios)


def dr_grpo(rows):
    return -sum(surrogate(ratio, row.A, 0.2, 0.2) for row in rows for ratio in row.ratios) / (len(rows) * LONGEST)


def gspo(rows):
    return -fmean(surrogate(math.prod(row.ratios) ** (1 / len(row.new)), row.A, 3e-4, 4e-4) for row in rows)


def cispo(rows):
    return -fmean(min(r, 5.0) * row.A * new for row in rows for r, new in zip(row.ratios, row.new, strict=True))


def rloo(rows):
    return -fmean(surrogate(math.prod(row.ratios), row.A, 0.2, 0.2) for row in rows)


LOSSES = {loss.__name__: loss for loss in (deepseek, grpo, dapo, dr_grpo, gspo, cispo, rloo)}
# How far apart the two policies are: standard deviation of the log-ratio of a token.
SPREADS = {"deepseek": 0.1, "gspo": 5e-3, "cispo": 1.5, "rloo": 0.1}


def advantages_by_hand(name, rewards):
    groups = [rewards[start : start + G] for start in range(0, len(rewards), G)]
    if name == "deepseek":
        return [(r - fmean(group)) / (pstdev(group) + 1e-8) for group in groups for r in group]
    if name in ("dr_grpo", "rloo"):
        return [r - fmean(group) for group in groups for r in group]
    return [(r - fmean(group)) / (stdev(group) + 1e-4) for group in groups for r in group]


def plain_scores(trainer, inputs):
    """Log-probs and entropies of the completion tokens from a plain forward of padded rows."""
    C = inputs["completion_ids"].size(1)
    ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_BT = torch.cat([inputs["prompt_mask"], torch.ones_like(inputs["completion_ids"])], dim=1)
    positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)
    logits_BTV = trainer.model(input_ids=ids_BT, attention_mask=attention_BT, position_ids=positions_BT).logits
    logps_BCV = (logits_BTV[:, -C - 1 : -1] / trainer.temperature).log_softmax(dim=-1)
    logps_BC = logps_BCV.gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2)
    return logps_BC, -(logps_BCV.exp() * logps_BCV).sum(dim=2)


@pytest.fixture
def rollout(build, tiny_model):
    """`rollout("dapo")`: a trainer with the algorithm, and a rollout with REWARDS, old log-probs and reference."""

    def roll_out(name, **changes):
        def fixed(completions, **columns):
            return REWARDS

        shaping = [overlong_punishment(LONGEST)] if ALGORITHMS[name].shapes_length else []
        settings = {"max_completion_length": LONGEST, "num_generations": G, "num_iterations": 2} | changes
        trainer = build(
            tiny_model,
            reward=[fixed, *shaping],
            prompts=PROMPTS * 4,
            peft_config=random_lora(target_modules=["v_proj"], lora_alpha=1),  # completions still end
            **(algorithm(name) | settings),
        )
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(0)
        inputs = trainer._generate_and_score_completions([{"prompt": text} for text in PROMPTS for _ in range(G)])
        return trainer, inputs

    return roll_out


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_and_loss_are_those_of_the_paper(rollout, tokenizer, name):
    trainer, inputs = rollout(name)
    ids_BC = inputs["completion_ids"]
    eos = tokenizer.eos_token_id
    ends = [eos in ids for ids in ids_BC.tolist()]
    lengths = [ids.index(eos) + 1 if eos in ids else LONGEST for ids in ids_BC.tolist()]
    assert {*ends} == {True, False}
    rewards = REWARDS
    if name == "dapo":  # 12.8 tokens are free; the next 3.2 cost up to 1
        free = LONGEST - round(LONGEST / 5)
        punishments = [-max(0, length - free) / (LONGEST - free) for length in lengths]
        assert -1.0 in punishments
        rewards = [reward + punishment for reward, punishment in zip(REWARDS, punishments, strict=True)]
    advantages = advantages_by_hand(name, rewards)
    assert inputs["advantages"].tolist() == pytest.approx(advantages, abs=1e-5)

    with torch.no_grad():
        logps_BC, entropies_BC = plain_scores(trainer, inputs)
        with trainer.model.disable_adapter():
            ref_BC, _ = plain_scores(trainer, inputs)
    log_ratios_BC = torch.randn(logps_BC.shape, generator=torch.Generator().manual_seed(1)) * SPREADS.get(name, 0.3)
    inputs["old_per_token_logps"] = logps_BC - log_ratios_BC
    rows = []
    for i, length in enumerate(lengths):
        kept = length if ends[i] or name != "dapo" else 0  # overlong filtering
        old_BC = inputs["old_per_token_logps"]
        per_token = (values[i, :kept].double().tolist() for values in (logps_BC, old_BC, ref_BC, entropies_BC))
        rows.append(Row(advantages[i], *per_token))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs).item()
    assert loss == pytest.approx(LOSSES[name](rows), rel=2e-5, abs=1e-6)


def test_the_gradient_of_rloo(rollout):
    """On policy: each log-prob of a completion times its reward less the mean of the others, up to G / (G - 1)."""
    trainer, inputs = rollout("rloo", num_iterations=1)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    found = [parameter.grad.clone() for parameter in parameters]
    baselines = [(sum(REWARDS[i // G * G : i // G * G + G]) - reward) / (G - 1) for i, reward in enumerate(REWARDS)]
    weights_B = torch.tensor([reward - baseline for reward, baseline in zip(REWARDS, baselines, strict=True)])
    trainer.model.zero_grad()
    logps_BC, _ = plain_scores(trainer, inputs)
    (-(weights_B * (logps_BC * inputs["completion_mask"]).sum(dim=1)).mean() * (G - 1) / G).backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def test_deepseek_is_the_default():
    default, named = GRPOExtConfig("a", use_cpu=True), GRPOExtConfig("a", use_cpu=True, **algorithm("deepseek"))
    assert named.to_dict() == default.to_dict()


def test_the_numbers_of_dapos_overlong_punishment():
    """20,480 tokens, of which the last 4,096 are punished."""
    punish = overlong_punishment(20_480)
    found = punish(completion_ids=[[0] * length for length in (1, 16_384, 17_408, 18_432, 20_480)])
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_an_unknown_algorithm():
    with pytest.raises(ValueError, match=r"'ppo' is unknown\. Valid: 'deepseek', 'grpo', 'dapo'"):
        algorithm("ppo")
