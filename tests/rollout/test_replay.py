"""Groups of recent steps replace dead ones: which are kept, for how long, and how the update treats them."""

import copy
import math
from pathlib import Path

import pytest
import torch

from grpo_ext.checkpoints.state import load_states, save_states
from grpo_ext.rollout.stages.replay import GroupReplayBuffer, StoredGroup
from grpo_ext.rollout.types import Completion
from tests.tools.lanes import slow
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, log_of, texts_of

SETTINGS = {"per_device_train_batch_size": 16, "max_steps": 2, "beta": 0.0, "entropy_coef": 0.0}
SETTINGS |= {"replay_fraction": 0.5, "learning_rate": 1e-2}


def kept(step, text="a", **changes):
    fields = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logps": [-0.1, -2.0 / 3], "is_cut": False}
    fields |= {"temperature": 0.8, "extra": {}}
    completion = Completion(example={"prompt": text}, completion=text, **fields | changes)
    return StoredGroup(completions=[completion], rewards_GF=[[1.0, math.nan]], all_rewards_M=[1.0, math.nan], step=step)


def test_the_youngest_come_first_and_once():
    buffer = GroupReplayBuffer(capacity=3, max_age=2)
    buffer.add([kept(0), kept(1)])
    buffer.add([kept(2), kept(3)])
    assert len(buffer) == 3
    assert [group.step for group in buffer.take(2)] == [3, 2]
    assert [group.step for group in buffer.take(2)] == [1]
    assert buffer.take(2) == []


def test_groups_of_an_earlier_training_are_dropped():
    """`train` counts steps from 0 again."""
    buffer = GroupReplayBuffer(capacity=8, max_age=4)
    buffer.add([kept(100)])
    assert buffer.drop_old(step=1) == 1
    assert len(buffer) == 0


def test_old_groups_are_dropped_and_counted():
    buffer = GroupReplayBuffer(capacity=9, max_age=2)
    buffer.add([kept(step) for step in (0, 1, 2)])
    assert buffer.drop_old(2) == 0
    buffer.add([kept(3)])
    assert buffer.drop_old(4) == 2
    assert [group.step for group in buffer.take(9)] == [3, 2]


def test_a_saved_buffer_is_the_same(tmp_path):
    """Log-probs to the bit, messages, unjudged rewards, and values that JSON cannot represent."""
    messages = [{"role": "user", "content": "Größe ≠ 尺寸"}]
    groups = [kept(1, messages), kept(2, is_cut=None, extra={"seen": Path("x")})]
    buffer = GroupReplayBuffer(capacity=9, max_age=2)
    buffer.add(groups)
    save_states(tmp_path, 0, {"replay": buffer.state_dict()})
    again = GroupReplayBuffer(capacity=9, max_age=2)
    again.load_state_dict(load_states(tmp_path, 0, torch.device("cpu"))["replay"])
    second, first = again.take(9)
    assert first.completions == groups[0].completions
    assert second.completions[0].extra == {"seen": "x"}
    assert str(first.rewards_GF) == "[[1.0, nan]]"
    assert (first.step, second.step) == (1, 2)


# In training


class DeadFrom:
    """Rewards differ by position in the group, except that those of two prompts are all 1 from a given step on."""

    __name__ = "dead_from"

    def __init__(self, step=1, prompts=(PROMPTS[0], PROMPTS[2])):
        self.step, self.dead = step, prompts

    def __call__(self, prompts, trainer_state, **columns):
        is_dead = trainer_state.global_step >= self.step
        return [1.0 if is_dead and p in self.dead else (i % 4) ** 2 / 9 for i, p in enumerate(prompts)]


def train(build, model, **settings):
    """The trainer, and for each micro-batch the inputs, the log-probs of a plain forward, and the loss."""
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **{"reward": DeadFrom()} | SETTINGS | settings)
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        logps_BC = plain_logps(trainer, inputs)
        loss = compute_loss(model, inputs, *args, **kwargs)
        seen.append((inputs, logps_BC, loss.item()))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    return trainer, seen


@torch.no_grad()
def plain_logps(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    C = inputs["completion_ids"].size(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -C - 1 : -1]
    logits = logits / inputs["temperature"].view(-1, 1, 1)
    return logits.log_softmax(-1).gather(2, ids[:, -C:].unsqueeze(2)).squeeze(2)


def of_prompts(trainer, inputs, prompts):
    """Text, advantage and sampled log-probs of the rows on these prompts, sorted."""
    rows = zip(
        texts_of(trainer, inputs),
        inputs["advantages"].tolist(),
        inputs["sampling_per_token_logps"].tolist(),
        strict=True,
    )
    return sorted((text, a, [x for x in logps if x]) for text, a, logps in rows if text[0] in prompts)


def test_groups_of_the_previous_step_replace_dead_ones(build, small_model):
    """The two youngest groups of step 0 replace the two dead groups of step 1, with their completions, their sampled
    log-probs and their advantages. The mixed groups stay."""
    trainer, seen = train(build, small_model)
    (before, _, _), (after, _, _) = seen
    assert before["is_replayed"].tolist() == [False] * 16
    assert after["is_replayed"].sum() == 8
    replayed = {name: value[after["is_replayed"]] for name, value in after.items() if value.dim()}
    prompts = {prompt for prompt, _ in texts_of(trainer, replayed)}
    assert len(prompts) == 2
    assert of_prompts(trainer, replayed, prompts) == of_prompts(trainer, before, prompts)
    fresh = {name: value[~after["is_replayed"]] for name, value in after.items() if value.dim()}
    assert {prompt for prompt, _ in texts_of(trainer, fresh)} == {PROMPTS[1], PROMPTS[3]}
    assert log_of(trainer, "replay/hit_rate") == [1.0]
    assert log_of(trainer, "replay/age") == [1.0]
    assert log_of(trainer, "frac_groups/all_right") == [0.0, 0.5]
    # over all sampled groups, including those that were replaced
    alive = sum(i**2 / 9 for i in range(4)) / 4
    assert log_of(trainer, "reward_drawn") == pytest.approx([alive, (alive + 1) / 2])
    assert log_of(trainer, "reward") == pytest.approx([alive, alive])
    assert len(trainer.parts.stages[-1].buffer) == 2 + 2


def by_hand(inputs, logps_BC):
    """The sequence-level loss without KL and entropy. Replayed rows have their sampled log-probs as old ones, the
    others those of the current policy."""
    mask = inputs["completion_mask"]
    old = inputs["sampling_per_token_logps"].where(inputs["is_replayed"].unsqueeze(1), logps_BC)
    ratio = ((logps_BC - old) * mask).sum(1).exp()
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean().item(), ratio


@pytest.mark.parametrize(
    "settings",
    [
        slow({}),
        {"chunk_tokens": 40},
        slow({"temperature": 0.6, "temperature_schedule": "linear", "temperature_end": 1.4}),
    ],
    ids=["whole", "chunks", "temperature"],
)
def test_the_loss_of_replayed_rows_by_hand(build, small_model, settings):
    """The ratio of a row is relative to the policy and the temperature that it was sampled with."""
    _, seen = train(build, small_model, max_steps=3, **settings)
    for step, (inputs, logps_BC, loss) in enumerate(seen):
        want, ratio = by_hand(inputs, logps_BC)
        assert loss == pytest.approx(want, abs=1e-5)
        is_off = (ratio - 1).abs() > 1e-4
        assert torch.equal(is_off, inputs["is_replayed"])
        temperatures = set(inputs["temperature"].tolist())
        assert len(temperatures) == (2 if step and "temperature_end" in settings else 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"epsilon": 1e-8}),
        slow({"temperature": 0.3, "temperature_schedule": "linear", "temperature_end": 1.6}),
    ],
    ids=["trusted", "not_trusted", "temperature"],
)
def test_several_steps_on_a_rollout(build, small_model, settings):
    """When TRL scores a rollout for old log-probs, replayed rows keep the sampled ones and do not count in the check of
    the sampler, and fresh rows keep theirs in the second step. With the tiny epsilon, the sampler is never trusted, and
    TRL scores every row."""
    trainer, seen = train(build, small_model, num_iterations=2, max_steps=8, learning_rate=1e-3, **settings)
    for inputs, _, _ in seen:
        gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).abs().max()
        assert gap < 1e-4
    assert seen[2][0]["is_replayed"].sum() == 8
    assert max(log_of(trainer, "sampling/logp_gap")) < 1e-3
    drift = ((seen[2][1] - seen[2][0]["old_per_token_logps"]) * seen[2][0]["completion_mask"]).sum(1).abs()
    assert (drift[seen[2][0]["is_replayed"]] > 1e-3).all()


def test_what_is_far_from_the_policy_is_dropped(build, small_model):
    """The learning rate moves some completions by more than a nat, as plain forwards before and after the step show. A
    group is dropped if any of its completions moved that far."""
    trainer = build(
        copy.deepcopy(small_model), peft_config=random_lora(), reward=DeadFrom(), **SETTINGS | {"learning_rate": 3.0}
    )
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        first = seen[0][0] if seen else inputs
        seen.append((inputs, plain_logps(trainer, first)))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    (first, before), (second, after) = seen
    moved_B = ((after - before) * first["completion_mask"]).sum(1).abs().tolist()
    furthest = {}
    for (prompt, _), moved in zip(texts_of(trainer, first), moved_B, strict=True):
        furthest[prompt] = max(moved, furthest.get(prompt, 0.0))
    close = {prompt for prompt, moved in furthest.items() if moved <= 1.0}
    assert len(close) == 1
    assert log_of(trainer, "replay/dropped_far") == [0.0, 3.0]
    assert log_of(trainer, "replay/hit_rate") == [0.5]
    replayed = {name: value[second["is_replayed"]] for name, value in second.items() if value.dim()}
    assert of_prompts(trainer, replayed, PROMPTS) == of_prompts(trainer, first, close)
    assert (second["advantages"] == 0).sum() == 4  # the other dead group stays


def test_another_temperature_does_not_count_as_distance(build, small_model):
    """Log-probs at 0.1 and 1.4 differ by several nats, so both sides are computed at the temperature of the row."""
    moving = {"temperature": 0.1, "temperature_schedule": "linear", "temperature_end": 1.4, "learning_rate": 1e-9}
    trainer, _ = train(build, small_model, **moving)
    assert log_of(trainer, "replay/hit_rate") == [1.0]


def test_what_is_old_is_dropped(build, small_model):
    """Every group is dead from step 1 on. Steps 1 and 2 replay one group each; in step 3, the other two are too old."""
    reward = DeadFrom(1, PROMPTS)
    trainer, _ = train(
        build, small_model, reward=reward, max_steps=4, replay_max_age=2, replay_fraction=0.25, learning_rate=1e-3
    )
    assert log_of(trainer, "replay/hit_rate") == [1.0, 1.0, 0.0]
    assert log_of(trainer, "replay/age") == [1.0, 2.0]
    assert log_of(trainer, "replay/dropped_old") == [0.0, 0.0, 0.0, 2.0]


def test_without_dead_groups_nothing_changes(build, small_model):
    reward = DeadFrom(99)
    plain = build(
        copy.deepcopy(small_model), peft_config=random_lora(), reward=reward, **SETTINGS | {"replay_fraction": 0}
    )
    plain.train()
    ours, _ = train(build, small_model, reward=reward)
    for name, value in adapter_of(plain).items():
        assert torch.equal(adapter_of(ours)[name], value), name


def test_a_resumed_run_has_its_replay_buffer(build, small_model, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1}
    whole, seen = train(build, small_model, **settings)
    again = build(
        copy.deepcopy(small_model),
        peft_config=random_lora(),
        reward=DeadFrom(),
        **SETTINGS | settings | {"max_steps": 2},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert log_of(again, "replay/hit_rate") == [1.0]
    (part,) = again._buffered_inputs
    replayed = {name: value[part["is_replayed"]] for name, value in part.items() if value.dim()}
    assert of_prompts(again, replayed, PROMPTS) == of_prompts(
        whole, seen[0][0], {p for p, _ in texts_of(again, replayed)}
    )


def test_other_rewards_empty_the_buffer(build, small_model, tmp_path, caplog):
    """Stored totals were computed with the earlier weights, and would give wrong advantages."""
    saves = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    train(build, small_model, max_steps=2, **saves)
    accepted = {"reward_weights": [0.5], "accept_changes": "reward_weights"}
    accepted |= {"max_steps": 4, "reward": DeadFrom(), "peft_config": random_lora()}
    resumed = build(copy.deepcopy(small_model), **SETTINGS | saves | accepted)
    resumed.train(resume_from_checkpoint="last")
    assert "The state of 'Replay' in the checkpoint is not used: changed reward_weights." in caplog.text
    assert resumed.state.global_step == 4


def test_refused_if_nothing_can_be_replayed(build, small_model):
    with pytest.raises(
        ValueError, match=r"replay_fraction=0.1 of 4 groups per rollout is less than one.* Use at least 0.25"
    ):
        build(small_model, **SETTINGS | {"replay_fraction": 0.1})
    small_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"replay_fraction=0\.5 needs the log-probs of shared sampling"):
        build(small_model, **SETTINGS)
