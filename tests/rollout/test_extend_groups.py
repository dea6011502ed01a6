"""Groups that grow while they are dead: which completions are kept, their advantages, and one prefill per prompt."""

import copy
import itertools
import math
import random

import pytest
import torch

from grpo_ext.losses.advantages import population_advantages
from grpo_ext.losses.subset import max_variance_subset
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, count_draws, log_of, texts_of

NAN = math.nan
SETTINGS = {"per_device_train_batch_size": 16, "max_steps": 1, "beta": 0.0, "num_generations_max": 10}


# Subsets and advantages


@pytest.mark.parametrize(
    ("rewards", "size", "chosen"),
    [
        ([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 4, [0, 1, 2, 3]),
        ([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], 4, [0, 1, 2, 5]),
        ([0.5, 0.1, 0.9, 0.4], 2, [1, 2]),
        ([0.0, 0.2, 0.3, 1.0, 0.9], 3, [0, 3, 4]),
        # unjudged completions are chosen last
        ([NAN, 0.0, NAN, 1.0], 3, [0, 1, 3]),
        ([NAN, 0.0, 1.0, 0.5, NAN], 2, [1, 2]),
        ([1.0, 0.0], 2, [0, 1]),
    ],
)
def test_subset_by_hand(rewards, size, chosen):
    assert max_variance_subset(torch.tensor(rewards), size) == chosen


def test_no_other_subset_has_more_variance():
    """Against all subsets, with and without ties."""
    rng = random.Random(0)
    for _ in range(200):
        rewards = [rng.choice([0.0, 1.0, round(rng.random(), 1)]) for _ in range(rng.randint(2, 9))]
        size = rng.randint(1, len(rewards))
        chosen = max_variance_subset(torch.tensor(rewards, dtype=torch.float64), size)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == size

        def variance(indices, rewards=rewards):
            return torch.tensor([rewards[i] for i in indices], dtype=torch.float64).var(correction=0).item()

        best = max(map(variance, itertools.combinations(range(len(rewards)), size)))
        assert variance(chosen) == pytest.approx(best, abs=1e-12)


def test_advantages_are_those_among_all_completions():
    """One of four completions is right, and two are trained on: mean 1/4, deviation sqrt(3)/4. The second group did not
    grow. The third is mixed as a whole, although the rows that are trained on have equal rewards."""
    all_rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, NAN, NAN], [0.0, 0.0, NAN, 1.0]])
    got = population_advantages(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 2, all_rewards_PM=all_rewards)
    want = [-1 / math.sqrt(3), math.sqrt(3), 1.0, -1.0, -math.sqrt(0.5), -math.sqrt(0.5)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)


# In training


class EventuallyRight:
    """Right for every completion of the first prompt, and for the third from its seventh completion on. Others vary."""

    __name__ = "eventually_right"

    def __init__(self):
        self.judged = dict.fromkeys(PROMPTS, 0)
        self.scores = {}

    def __call__(self, prompts, log_extra, completions, **columns):
        log_extra("seen", list(completions))
        scores = [self.score(prompt) for prompt in prompts]
        self.scores |= dict(zip(completions, scores, strict=True))
        return scores

    def score(self, prompt):
        self.judged[prompt] += 1
        nth = self.judged[prompt]
        return {PROMPTS[0]: 1.0, PROMPTS[2]: float(nth > 6)}.get(prompt, 0.1 * (nth % 4))


def train(build, model, **settings):
    """The trainer, and the rows and embedded tokens of each call of the sampler."""
    trainer = build(
        copy.deepcopy(model), peft_config=random_lora(), **{"reward": EventuallyRight()} | SETTINGS | settings
    )
    tokens, generate = [], trainer._generate_single_turn
    (embedding,) = (m for m in trainer.model.modules() if isinstance(m, torch.nn.Embedding))

    def watched(*args, **kwargs):
        tokens.append(0)

        def count(module, inputs, output):
            tokens[-1] += inputs[0].numel()

        with embedding.register_forward_hook(count):
            return generate(*args, **kwargs)

    trainer._generate_single_turn = watched
    draws = count_draws(trainer)
    trainer.train()
    return trainer, draws, tokens


def test_dead_groups_grow_until_they_are_mixed(build, small_model, tokenizer):
    """Two groups of four are dead. Four more completions each make one of them mixed; two more leave the other dead."""
    trainer, draws, _ = train(build, small_model)
    assert draws == [16, 8, 2]
    assert log_of(trainer, "growth/groups") == [2.0]
    assert log_of(trainer, "growth/alive") == [1.0]
    assert log_of(trainer, "frac_groups/mixed") == [0.75]
    (part,) = trainer._buffered_inputs
    advantages = {prompt: [] for prompt in PROMPTS}
    for (prompt, _), advantage in zip(texts_of(trainer, part), part["advantages"].tolist(), strict=True):
        advantages[prompt].append(round(advantage, 4))
    assert advantages[PROMPTS[0]] == [0.0] * 4
    # two of eight completions are right: mean 1/4, deviation sqrt(3)/4
    assert sorted(advantages[PROMPTS[2]]) == [-0.5774, -0.5774, 1.7321, 1.7321]
    everything = [1.0] * 10 + [0.0] * 6 + [1.0] * 2 + [0.1, 0.2, 0.3, 0.0] * 2
    assert log_of(trainer, "reward_drawn")[0] == pytest.approx(sum(everything) / len(everything))


def test_prompts_are_prefilled_once(build, small_model, tokenizer):
    """The embedding sees each distinct prompt once, and every token of a completion except the last one."""
    lengths = []

    def all_wrong(completion_ids, **columns):
        lengths.append(sum(map(len, completion_ids)))
        return [0.0] * len(completion_ids)

    _, draws, tokens = train(build, small_model, reward=all_wrong)
    assert draws == [16, 16, 8]
    prompt_tokens = sum(len(ids) for ids in tokenizer(PROMPTS)["input_ids"])
    for i, (rows, embedded) in enumerate(zip(draws, tokens, strict=True)):
        assert embedded == lengths[i] - rows + (prompt_tokens if i == 0 else 0)


def test_rows_stay_whole(build, small_model):
    """Ids, text, reward, logged columns and sampled log-probs of a row still belong to one completion. TRL's scoring
    agrees with the log-probs of completions that continue a kept prompt cache."""
    reward = EventuallyRight()
    trainer, draws, _ = train(build, small_model, reward=reward, num_iterations=2, max_steps=2)
    assert len(draws) > 2
    logs, (part,) = trainer._logs, trainer._buffered_inputs
    assert list(logs["extra"]["seen"]) == list(logs["completion"])
    assert list(logs["rewards"]["eventually_right"]) == pytest.approx(
        [reward.scores[text] for text in logs["completion"]]
    )
    assert sorted(texts_of(trainer, part)) == sorted(zip(logs["prompt"], logs["completion"], strict=True))
    assert max(log_of(trainer, "sampling/logp_gap")) < 1e-4
    assert trainer.parts.sampler._engine._kept_prompts is None


def test_without_dead_groups_nothing_changes(build, small_model):
    def alive(prompts, **columns):
        return [0.1 * (i % 4) for i, _ in enumerate(prompts)]

    plain, draws, _ = train(build, small_model, reward=alive, num_generations_max=None, max_steps=3)
    grown, same_draws, _ = train(build, small_model, reward=alive, max_steps=3)
    assert draws == same_draws == [16] * 3
    for name, value in adapter_of(plain).items():
        assert torch.equal(adapter_of(grown)[name], value), name


def test_groups_that_stay_dead_are_resampled(build, small_model):
    """Every completion of the first prompt is right, however many there are, so another prompt replaces it."""
    trainer, draws, _ = train(build, small_model, dead_groups="resample", max_resample_rounds=30)
    assert draws[:4] == [16, 8, 2, 4]
    assert PROMPTS[0] not in trainer._logs["prompt"]
    assert log_of(trainer, "resampled_groups") == [1.0]
    (part,) = trainer._buffered_inputs
    assert (part["advantages"] != 0).all()


def test_refused_if_groups_cannot_grow(build, small_model):
    small_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="num_generations_max=10 needs the KV caches that shared sampling keeps"):
        build(small_model, **SETTINGS)
