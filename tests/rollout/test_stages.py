"""The stages of a rollout without a trainer: a table replaces the sampler and the rewards."""

from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch

from grpo_ext.rollout.collect import collect
from grpo_ext.rollout.stages.extend_groups import ExtendGroups
from grpo_ext.rollout.stages.replay import GroupReplayBuffer, Replay
from grpo_ext.rollout.stages.resample import Resample
from grpo_ext.rollout.types import Completion, Rollout

G = 2


class Table:
    """Samples completions with the given rewards, listed per prompt in sampling order."""

    def __init__(self, rewards):
        self.rewards = {prompt: list(values) for prompt, values in rewards.items()}
        self.calls, self.sampled = [], []

    def __call__(self, examples, group_size=None):
        self.calls.append([example["prompt"] for example in examples])
        values = [self.rewards[example["prompt"]].pop(0) for example in examples]
        completions = [
            Completion(
                example=example,
                prompt_ids=[1],
                completion_ids=[2],
                completion=f"{example['prompt']} {value}",
                logps=[-1.0],
                is_cut=False,
                temperature=1.0,
                extra={},
            )
            for example, value in zip(examples, values, strict=True)
        ]
        self.sampled += completions
        rewards_BF = torch.tensor(values).unsqueeze(1)
        rewards_PM = rewards_BF.squeeze(1).double().view(-1, group_size or G)
        return Rollout(
            completions=completions,
            first_row=0,
            rewards_BF=rewards_BF,
            all_rewards_PM=rewards_PM,
            sampled_PM=[rewards_PM.clone()],
        )


@contextmanager
def kept():
    yield


@pytest.fixture
def metrics():
    return defaultdict(list)


@pytest.fixture
def record(metrics):
    return lambda name, value: metrics[name].append(value)


def rows(*prompts):
    return [{"prompt": prompt} for prompt in prompts for _ in range(G)]


def texts(rollout):
    return [completion.completion for completion in rollout.completions]


def extend(record, limit=6):
    return ExtendGroups(
        limit=limit,
        group_size=G,
        total=lambda rewards: rewards.double().sum(-1),
        keep_prompt_caches=kept,
        record=record,
    )


def resample(record, prompts, rounds=3):
    dataset = [{"prompt": prompt} for prompt in prompts]
    return Resample(
        max_rounds=rounds,
        group_size=G,
        whole_groups=False,
        dataset=lambda: dataset,
        step=lambda: 0,
        seed=0,
        record=record,
    )


def test_a_dead_group_is_extended_until_it_is_mixed(metrics, record):
    """The mixed group does not change. The dead one gets two more completions twice, and the pair that differs most is
    kept, with the rewards of all six."""
    table = Table({"a": [1.0, 0.0], "b": [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]})
    rollout = extend(record)(rows("a", "b"), table)
    assert table.calls == [["a", "a", "b", "b"], ["b", "b"], ["b", "b"]]
    assert sorted(texts(rollout)) == ["a 0.0", "a 1.0", "b 0.0", "b 1.0"]
    assert rollout.rewards_BF.flatten().tolist()[:2] == [1.0, 0.0]
    assert sorted(rollout.rewards_BF.flatten().tolist()[2:]) == [0.0, 1.0]
    assert rollout.all_rewards_PM[1].nansum() == 1.0
    assert rollout.all_rewards_PM[0].isnan().sum() == 4
    assert metrics == {"growth/groups": [1.0], "growth/alive": [1.0]}


def test_a_group_that_stays_dead_keeps_its_first_completions(metrics, record):
    table = Table({"a": [0.0] * 6})
    rollout = extend(record)(rows("a"), table)
    assert len(table.calls) == 3
    assert [id(row) for row in rollout.completions] == [id(row) for row in table.sampled[:G]]
    assert metrics == {"growth/groups": [1.0], "growth/alive": [0.0]}


def test_dead_groups_are_resampled_and_still_counted(metrics, record):
    """Each round samples one prompt per dead group. The rewards of every sampled group are kept."""
    table = Table({"dead": [0.0, 0.0], "a": [1.0, 0.0], "b": [0.0, 1.0] * 9})
    rollout = resample(record, ["b"])(rows("dead", "a"), table)
    assert texts(rollout) == ["b 0.0", "b 1.0", "a 1.0", "a 0.0"]
    assert rollout.all_rewards_PM.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.cat(rollout.sampled_PM).tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert metrics == {"resampled_groups": [1.0]}


def test_resampling_ends_after_its_rounds(metrics, record):
    table = Table({"dead": [0.0] * 20})
    rollout = resample(record, ["dead"], rounds=2)(rows("dead"), table)
    assert len(table.calls) == 1 + 2
    assert texts(rollout) == ["dead 0.0", "dead 0.0"]
    assert metrics == {"resampled_groups": [0.0]}


def test_later_stages_sample_through_earlier_ones(record):
    """Resampled groups are extended, too."""
    table = Table({"dead": [0.0] * 6, "late": [0.0, 0.0, 0.0, 1.0]})
    rollout = collect(rows("dead"), table, [extend(record), resample(record, ["late"])])
    assert sorted(texts(rollout)) == ["late 0.0", "late 1.0"]
    assert table.calls[3:] == [["late", "late"], ["late", "late"]]


@pytest.mark.parametrize(("moved", "replayed"), [(0.5, True), (1.5, False)])
def test_a_mixed_group_is_replayed_unless_the_policy_moved_away(metrics, record, moved, replayed):
    """If the log-ratio of a completion exceeds 1, its group is too far from the policy."""
    table = Table({"a": [1.0, 0.0], "dead": [0.0, 0.0]})

    def score(completions):
        return torch.full((len(completions), 1), -1.0 - moved), torch.ones(len(completions), 1)

    step = [0]
    buffer = GroupReplayBuffer(capacity=4, max_age=2)
    stage = Replay(max_groups=1, buffer=buffer, score=score, step=lambda: step[0], record=record)
    stage(rows("a"), table)
    step[0] = 1
    rollout = stage(rows("dead"), table)
    assert texts(rollout) == (["a 1.0", "a 0.0"] if replayed else ["dead 0.0", "dead 0.0"])
    assert rollout.replayed == ({0} if replayed else set())
    assert rollout.sampled_rows().is_replayed == [replayed] * G
    assert metrics["replay/hit_rate"] == [float(replayed)]
    assert metrics["replay/dropped_far"] == [0.0, float(not replayed)]


def test_a_replay_buffer_is_carried_from_run_to_run(record):
    table = Table({"a": [1.0, 0.0], "dead": [0.0, 0.0]})
    stages = [
        Replay(
            max_groups=1,
            buffer=GroupReplayBuffer(capacity=4, max_age=2),
            score=lambda completions: (-torch.ones(len(completions), 1), torch.ones(len(completions), 1)),
            step=lambda: 0,
            record=record,
        )
        for _ in range(2)
    ]
    stages[0](rows("a"), table)
    stages[1].load_state_dict(stages[0].state_dict())
    assert texts(stages[1](rows("dead"), table)) == ["a 1.0", "a 0.0"]


def test_completions_without_log_probs_are_not_replayed(record):
    """Some samplers do not report log-probs."""
    table = Table({"a": [1.0, 0.0]})

    def without_logps(examples, group_size=None):
        rollout = table(examples, group_size)
        for completion in rollout.completions:
            vars(completion)["logps"] = None
        return rollout

    buffer = GroupReplayBuffer(capacity=4, max_age=2)
    Replay(max_groups=1, buffer=buffer, score=None, step=lambda: 0, record=record)(rows("a"), without_logps)
    assert len(buffer) == 0
