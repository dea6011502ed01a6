"""Difficulty pools: draw probabilities worked out by hand, the pools of a run, and start values."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset

from grpo_ext.data.pass_rates import PassRate, read_pass_rates, write_pass_rates
from grpo_ext.rollout.pools import DifficultyPools, mixed_probability, reward_variance
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS, half_dead
from tests.tools.training import log_of

NAN = float("nan")


def started(*rates, answers=98, **settings):
    """Pools in which each problem has this pass rate, from `answers` answers."""
    pools = DifficultyPools(**{"problems": len(rates), "group_size": 8, "seed": 0} | settings)
    pools.start_from([PassRate(rate=rate, answers=answers) for rate in rates])
    return pools


def rising(start):
    """start (start + 1) ... (start + 7)."""
    return math.prod(range(start, start + 8))


def frequencies(pools, calls):
    """How often each problem is the only one chosen, without learning anything about it."""
    start = pools.state_dict()
    counts = Counter()
    for call in range(calls):
        pools.load_state_dict(start | {"calls": call})
        counts.update(pools.choose(1))
    return {problem: count / calls for problem, count in counts.items()}


def answer(pools, *groups, perfect=1.0):
    """A rollout of one group per problem: what the answers to each problem earned, by problem."""
    rewards = dict(groups)
    chosen = pools.choose(len(rewards))
    pools.observe([torch.tensor([rewards[problem] for problem in chosen])], perfect=perfect)
    return chosen


def test_pass_rates_by_hand():
    """A uniform prior, and half the weight for the answers before each group: (1 + passes) / (2 + answers)."""
    pools = DifficultyPools(problems=2, group_size=4, seed=0)
    assert pools.pass_rates().tolist() == [1 / 2, 1 / 2]
    answer(pools, (0, [1.0, 1.0, 0.0, 0.0]), (1, [1.0, NAN, 0.0, 0.0]))
    assert pools.pass_rates().tolist() == pytest.approx([3 / 6, 2 / 5])
    answer(pools, (0, [1.0, 1.0, 1.0, 0.0]), (1, [NAN] * 4))
    assert pools.pass_rates().tolist() == pytest.approx([(1 + 1 + 3) / (2 + 2 + 4), 2 / 5])


def test_an_answer_passes_above_half_of_a_perfect_reward():
    """Two rewards of up to 1, one of them for the format: an answer that has only the format does not pass."""
    pools = DifficultyPools(problems=1, group_size=4, seed=0)
    answer(pools, (0, [2.0, 1.0, 0.5, 1.5]), perfect=2.0)
    assert pools.pass_rates().tolist() == pytest.approx([3 / 6])


@pytest.mark.parametrize(
    ("worth", "weights"),
    [
        # Beta(50, 50) and Beta(12, 88): ab / ((a+b)(a+b+1))
        (reward_variance, (2500 / 10100, 1056 / 10100)),
        # E[p^8] of Beta(a, b) is a(a+1)...(a+7) / (a+b)(a+b+1)...(a+b+7)
        (mixed_probability, (1 - 2 * rising(50) / rising(100), 1 - (rising(12) + rising(88)) / rising(100))),
    ],
)
def test_draw_probabilities_by_hand(worth, weights):
    """Two learning problems, and no resting one: each is drawn in proportion to its worth, 0.70 or 0.61 here."""
    first, second = weights
    pools = started(49 / 98, 11 / 98, worth=worth)
    assert frequencies(pools, 6000)[0] == pytest.approx(first / (first + second), abs=0.02)


def test_worths_by_hand():
    a, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert reward_variance(a, b, 8).tolist() == pytest.approx([1 / 6, 2 / 12])
    # E[p^2] is 1/3 for Beta(1, 1); for Beta(2, 1), E[p^2] is 1/2 and E[(1-p)^2] is 1/6
    assert mixed_probability(a, b, 2).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_an_eighth_of_the_groups_goes_to_resting_problems():
    """Problems 2 and 3 rest, as unsolved and as solved; without that share, they would never be drawn again."""
    found = frequencies(started(0.5, 0.5, 0.0, 1.0), 4000)
    assert found[0] + found[1] == pytest.approx(7 / 8, abs=0.02)
    assert found[2] + found[3] == pytest.approx(1 / 8, abs=0.02)
    assert found[2] == pytest.approx(found[3], abs=0.02)


def test_the_longest_rest_ends_first():
    """With all problems at rest, every problem comes back once before any comes back twice."""
    pools = started(*[0.0] * 12)
    drawn = [pools.choose(4) for _ in range(6)]
    for passes in (drawn[:3], drawn[3:]):
        assert sorted(problem for chosen in passes for problem in chosen) == list(range(12))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_problems_of_small_groups_rest_too(size):
    """Earlier answers count half, so few answers never reach a rate of 0.9."""
    pools = DifficultyPools(problems=1, group_size=size, seed=0)
    for _ in range(2):
        answer(pools, (0, [1.0] * size))
    assert pools.shares()["solved"] == 1.0


def test_one_dead_group_of_eight_rests_and_one_right_answer_does_not():
    pools = DifficultyPools(problems=3, group_size=8, seed=0)
    answer(pools, (0, [0.0] * 8), (1, [1.0] + [0.0] * 7), (2, [1.0] * 8))
    assert pools.shares() == {"unseen": 0, "unsolved": 1 / 3, "learning": 1 / 3, "solved": 1 / 3}


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_problem_is_drawn_once_before_any_is_drawn_twice(shuffle):
    """The last rollout of the first pass has fewer unseen problems than groups."""
    pools = DifficultyPools(problems=10, group_size=4, seed=0, shuffle=shuffle)
    drawn = []
    for _ in range(3):
        chosen = pools.choose(4)
        pools.observe([torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 4)], perfect=1.0)
        drawn += chosen
    assert sorted(drawn[:10]) == list(range(10))
    assert (drawn[:10] == list(range(10))) is not shuffle
    assert len(set(drawn[8:])) == 4


def test_more_groups_than_problems():
    """Resampling may need more groups than there are problems."""
    pools = started(0.5, 0.0, 1.0)
    assert sorted(pools.choose(6)) == [0, 0, 1, 1, 2, 2]


def test_a_copy_with_the_same_state_goes_on_equally():
    """Guards against state that is not saved, and against a generator that depends on how often it was built."""
    pools = started(0.5, 0.4, 0.3, 0.2, 0.0, 1.0)
    for _ in range(3):
        pools.choose(2)
        pools.observe([torch.tensor([[1.0, 0.0], [0.0, 0.0]])], perfect=1.0)
    again = DifficultyPools(problems=6, group_size=8, seed=0)
    again.load_state_dict(copy.deepcopy(pools.state_dict()))
    for _ in range(5):
        assert again.choose(3) == pools.choose(3)
        for each in (pools, again):
            each.observe([torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])], perfect=1.0)
    assert again.shares() == pools.shares()


def test_an_abandoned_rollout_counts_nothing():
    """A rollout that was interrupted must not give its problems the rewards of the next one."""
    pools = started(0.5, 0.5)
    pools.choose(2)
    pools.choose_more(1)
    answer(pools, (0, [1.0] * 8), (1, [1.0] * 8))
    assert pools.pass_rates().min() > 0.5


# Start values


def test_start_values_of_a_column():
    rows = Dataset.from_dict({"prompt": PROMPTS[:3], "pass_rate": [0.25, None, 1], "difficulty": [0.0, 1.0, 0.75]})
    found = read_pass_rates("pass_rate", rows, answers=4)
    assert found == [PassRate(rate=0.25, answers=4), None, PassRate(rate=1.0, answers=4)]
    assert [known.rate for known in read_pass_rates("difficulty", rows, answers=4)] == [1.0, 0.0, 0.25]


def test_start_values_of_a_file(tmp_path):
    """Matched by prompt, in any order; a prompt that occurs twice has the answers of both lines."""
    chat = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    path = tmp_path / "rates.jsonl"
    write_pass_rates(path, [chat[1], chat[0], chat[1]], [0.5, 1.0, 0.0], answers=8)
    found = read_pass_rates(str(path), Dataset.from_dict({"prompt": chat}), answers=4)
    assert found == [PassRate(rate=1.0, answers=8), PassRate(rate=0.25, answers=16), None]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("level", r"numbers from 0 to 1 in that column, or no value, got 5 in row 1"),
        ("passed", r"neither a column of the training data, which has 'prompt', 'level', nor a file"),
        ("other.jsonl", r"has none of the 2 prompts of the training data.* --split train"),
        ("broken.jsonl", r"line 1 is not a JSON object with `prompt`, `answers` and `passes`"),
    ],
)
def test_unusable_start_values(tmp_path, source, message):
    write_pass_rates(tmp_path / "other.jsonl", ["3+3"], [0.5], answers=8)
    (tmp_path / "broken.jsonl").write_text(json.dumps({"question": "1+1"}) + "\n", encoding="utf-8")
    path = tmp_path / source
    rows = Dataset.from_dict({"prompt": ["1+1", "2+2"], "level": [1, 5]})
    with pytest.raises(ValueError, match=message):
        read_pass_rates(str(path) if path.exists() else source, rows, answers=8)


# In a trainer


def prompts_of(trainer):
    """The prompts of each training rollout from now on, one per group."""
    seen, generate = [], trainer._generate_single_turn

    def watched(prompt_ids, *args, **kwargs):
        seen.append(trainer.processing_class.batch_decode(prompt_ids)[:: trainer.num_generations])
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = watched
    return seen


MANY = [f"{i}+{i}" for i in range(10, 20)]
POOLS = {"curriculum": "pools", "prompts": MANY, "reward": half_dead, "max_steps": 8, "peft_config": random_lora()}


def run(build, model, **settings):
    trainer = build(copy.deepcopy(model), **POOLS | settings)
    seen = prompts_of(trainer)
    trainer.train()
    return trainer, seen


def test_loader_workers_have_no_influence(build, small_model):
    """A sampler that decides when rows are fetched would know less with more workers."""
    trainer, seen = run(build, small_model)
    other, seen_other = run(build, small_model, dataloader_num_workers=2, dataloader_prefetch_factor=4)
    assert seen_other == seen
    for name in ("pools/unsolved", "pools/learning", "reward"):
        assert log_of(other, name) == log_of(trainer, name)
    assert {prompt for rollout in seen[:5] for prompt in rollout} == set(MANY)


def test_answers_of_a_rollout_are_known_to_the_next_one(build, small_model):
    """After the first pass, only the solvable problem is drawn, except for the share of resting ones."""

    def solves_one(prompts, **columns):
        return [float(i % 2) if prompt == MANY[3] else 0.0 for i, prompt in enumerate(prompts)]

    trainer, seen = run(build, small_model, reward=solves_one, num_generations=8, max_steps=30)
    assert {prompt for (prompt,) in seen[:10]} == set(MANY)
    later = [prompt for (prompt,) in seen[10:]]
    assert later.count(MANY[3]) >= 0.7 * len(later)
    assert log_of(trainer, "pools/learning")[-1] == pytest.approx(0.1)
    assert log_of(trainer, "pools/unsolved")[-1] == pytest.approx(0.9)
    assert trainer.state.max_steps == 30


def test_steps_per_epoch_are_those_of_trl(build, small_model):
    trainer, seen = run(build, small_model, max_steps=-1, num_train_epochs=2)
    assert trainer.state.global_step == len(seen) == 10


def test_one_choice_per_rollout(build, small_model):
    """A rollout may serve several steps, of several micro-batches each."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    _, seen = run(build, small_model, **settings)
    assert [len(rollout) for rollout in seen] == [2] * 4
    assert len({prompt for rollout in seen for prompt in rollout}) == 8


def test_evaluation_is_excluded(build, small_model):
    """Held-out answers are counted as answers to the training problems of the same index otherwise, or refused."""
    evaluated = {"arguments": {"eval_dataset": Dataset.from_dict({"prompt": ["1+1", "2+2"]})}}
    trainer, seen = run(build, small_model, eval_strategy="steps", eval_steps=1, **evaluated)
    alone, _ = run(build, small_model)
    states = (each.parts.pools.state_dict() for each in (trainer, alone))
    first, second = ({name: torch.as_tensor(value) for name, value in state.items()} for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ["1+1", "2+2"] in seen


@pytest.mark.parametrize(
    "stage",
    [
        {"dead_groups": "resample"},
        {"replay_fraction": 0.5, "replay_max_age": 8},
        {"num_generations_max": 8},
        {"dead_groups": "resample", "num_generations_max": 8, "replay_fraction": 0.5},
    ],
    ids=["resample", "replay", "extend", "all"],
)
def test_with_stages(build, small_model, stage):
    """Every answer counts for its own problem: those to resampled prompts, those of extended groups, and not those that
    are replayed. The reward tells the problem, so an answer that counts elsewhere changes a pass rate to between."""

    def of_parity(prompts, **columns):
        return [float(int(prompt[:2]) % 2) for prompt in prompts]

    trainer, _ = run(build, small_model, reward=of_parity, **stage)
    rates = trainer.parts.pools.pass_rates()
    assert rates[1::2].min() >= 5 / 6
    assert rates[::2].max() <= 1 / 6
    if "num_generations_max" in stage:
        assert rates.max() >= 9 / 10


def test_columns_of_the_data_reach_the_rewards(build, small_model):
    """The row of a problem has its own gold answer."""

    def checked(prompts, answer, **columns):
        assert answer == [prompt[:2] for prompt in prompts]
        return [0.0] * len(prompts)

    run(build, small_model, reward=checked, columns={"answer": [prompt[:2] for prompt in MANY]})


def test_start_values_in_a_run(build, small_model, tmp_path):
    """Problems with a start value skip the first pass: only the two without one are drawn first."""
    write_pass_rates(tmp_path / "rates.jsonl", MANY[:8], [0.0] * 8, answers=8)
    _, seen = run(build, small_model, start_pass_rates=str(tmp_path / "rates.jsonl"), max_steps=1)
    assert set(seen[0]) == set(MANY[8:])


@pytest.mark.parametrize("prompts", [MANY[:6], [*MANY, "20+20", "21+21"]], ids=["fewer", "more"])
def test_changed_data_starts_from_no_pass_rates(build, small_model, tmp_path, prompts):
    """Pass rates of the old rows would count for the new ones of the same index, or name rows that do not exist."""
    folder = str(tmp_path / "run")
    saves = {"output_dir": folder, "save_strategy": "steps", "save_steps": 1}
    run(build, small_model, **saves, max_steps=2)
    accepted = POOLS | saves | {"prompts": prompts, "accept_changes": "train_dataset", "max_steps": 5}
    resumed = build(copy.deepcopy(small_model), **accepted)
    seen = prompts_of(resumed)
    resumed.train(resume_from_checkpoint="last")
    drawn = [prompt for rollout in seen for prompt in rollout]
    assert len(set(drawn)) == len(drawn) == 6
    assert set(drawn) <= set(prompts)
    assert len(resumed.parts.pools.pass_rates()) == len(prompts)


def test_streams_are_refused_before_the_model_is_loaded(build):
    """The name of the model does not exist, so loading it would fail first."""
    data = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1"}]))
    with pytest.raises(ValueError, match=r"curriculum='pools' .*IterableDataset.*curriculum='off'"):
        build("no/such-model", data=data, curriculum="pools")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": "pool"}, "curriculum='pool' is unknown. Valid: 'off', 'pools'"),
        ({"start_pass_rates": "pass_rate"}, "start_pass_rates='pass_rate' needs curriculum='pools', got 'off'"),
    ],
)
def test_refused_settings(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build("no/such-model", **settings)
