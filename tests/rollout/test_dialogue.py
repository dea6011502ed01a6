"""Multi-turn text environments: what the model sees, what it is trained on, and what a failing environment costs."""

import copy
import re

import pytest
import torch
from trl import GRPOTrainer

from grpo_ext.engine.decode import SampledCompletions
from grpo_ext.evaluation.complete import complete
from grpo_ext.evaluation.dialogue import evaluate_dialogue
from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.dialogue import Dialogue, TextEnv, dialogue_reward
from grpo_ext.rollout.example_envs import Calculator
from tests.tools.models import random_lora
from tests.tools.training import log_of, loss_by_hand, texts_of, tokens_of_the_policy

# Only environments write this character; the model cannot sample it.
MARK = "~"
REPLIES = re.compile(f"{MARK}[^{MARK}]*{MARK}")
LIMITS = {"max_completion_length": 40, "num_iterations": 2, "max_steps": 2}


class Digits(TextEnv):
    """Replies with the number of turns so far and ends at the first X, Y or Z. The reward is the share of digits."""

    def reset(self, row):
        self.turns = []
        return super().reset(row)

    def step(self, text):
        self.turns.append(text)
        return f"{MARK}{'.' * (len(text) % 4)}{len(self.turns)}{MARK}", any(c in "XYZ" for c in text)

    def reward(self):
        text = "".join(self.turns)
        return sum(c.isdigit() for c in text) / max(1, len(text))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental


@pytest.fixture
def build_player(build, small_model, tokenizer):
    """`build_player(Env, max_turns=4)`: a trainer on a tiny random llama that plays in it."""

    def make(env=Digits, *, max_turns=4, max_turn_tokens=8, model=small_model, arguments=None, **settings):
        dialogue = Dialogue(env, max_turns=max_turns, max_turn_tokens=max_turn_tokens)
        no_mark = {"suppress_tokens": [tokenizer.convert_tokens_to_ids(MARK), tokenizer.pad_token_id]}
        settings = {"reward": dialogue_reward, "generation_kwargs": no_mark} | LIMITS | settings
        arguments = {"rollout_func": dialogue} | (arguments or {})
        return build(copy.deepcopy(model), peft_config=random_lora(), arguments=arguments, **settings)

    return make


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "grpo"])
def test_replies_of_the_environment_are_seen_but_not_trained_on(build_player, tokenizer, loss_type):
    """The mask of every update excludes the replies, as found in its text, and the sampled log-probs equal the old
    ones. For the sequence-level objective, loss and gradients equal the formula on full logits. A failure means that
    the policy is trained on text that it did not write, or does not see the replies."""
    trainer = build_player(loss_type=loss_type)
    updates, compute_loss = [], trainer._compute_loss

    def compared(model, inputs):
        mask_BC = tokens_of_the_policy(inputs, tokenizer, REPLIES)
        assert torch.equal(inputs["completion_mask"] * inputs["tool_mask"], mask_BC)
        loss = compute_loss(model, inputs)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        wanted = None
        if loss_type == "grpo_sequence":
            by_hand = loss_by_hand(trainer, inputs, mask_BC)
            assert loss.item() == pytest.approx(by_hand.item(), abs=2e-5)
            wanted = torch.autograd.grad(by_hand, parameters, retain_graph=True)
        updates.append((inputs, mask_BC, grads, wanted))
        return loss

    trainer._compute_loss = compared
    trainer.train()
    assert len(updates) == 2
    for inputs, mask_BC, grads, wanted in updates:
        sampled_BC = inputs["sampling_per_token_logps"]
        torch.testing.assert_close(sampled_BC * mask_BC, inputs["old_per_token_logps"] * mask_BC, atol=1e-5, rtol=0)
        assert (sampled_BC[mask_BC == 0] == 0).all()
        for grad, want in zip(grads, wanted or grads, strict=True):
            assert want.norm() > 0
            assert (grad - want).norm() < 1e-4 * want.norm()
    assert log_of(trainer, "dialogue/turns")[0] > 1.5
    assert log_of(trainer, "sampling/logp_gap") == []  # sampled log-probs are not used as old ones: replies have none


def test_no_history_is_run_twice(build_player, tokenizer):
    """Tokens that pass through the embedding in a rollout: each initial prompt once per group, then every token of
    each row except its last one."""
    trainer = build_player(max_steps=1, num_iterations=1, beta=0.0)
    tokens, play = [], trainer.play
    (embedding,) = (m for m in trainer.model.modules() if isinstance(m, torch.nn.Embedding))

    def watched(dialogue):
        with embedding.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].numel())):
            played.append(play(dialogue))
        return played[-1]

    played = []
    trainer.play = watched
    trainer.train()
    (rollout,) = played
    prompts = {tuple(ids) for ids in rollout["prompt_ids"]}
    assert len(prompts) == 2
    assert len({tuple(ids) for ids in rollout["completion_ids"]}) == len(rollout["completion_ids"]) == 8
    assert sum(tokens) == sum(map(len, prompts)) + sum(len(ids) - 1 for ids in rollout["completion_ids"])
    assert trainer.parts.sampler._engine._kept_rows == {}


def test_rewards_and_rows_stay_together(build_player, tokenizer):
    """Each row's reward is that of its own completion, whatever the order in which rows end. Each rollout plays its own
    rows of the data, not those of an earlier one."""
    trainer = build_player(max_steps=2, num_iterations=1)
    trainer.train()
    logs = trainer._logs
    for text, reward in zip(logs["completion"], logs["rewards"]["dialogue_reward"], strict=True):
        own = REPLIES.sub("", text)
        assert reward == pytest.approx(sum(c.isdigit() for c in own) / max(1, len(own)))
    (part,) = trainer._buffered_inputs
    played = texts_of(trainer, part)
    assert sorted(played) == sorted(zip(logs["prompt"], logs["completion"], strict=True))  # of the last rollout
    lengths = {len(REPLIES.findall(text)) for text in logs["completion"]}
    assert len(lengths) > 1


# Limits, with scripted turns


class Script:
    """Samples the given texts in place of a model, one per turn, each cut at its limit."""

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.limits, self.histories = tokenizer, iter(turns), [], []

    def __call__(self, histories, limits):
        self.limits.append(limits)
        self.histories.append(self.tokenizer.batch_decode(histories))
        rows = [self.tokenizer(text)["input_ids"] for text in next(self.turns)]
        return SampledCompletions(
            tokens=[ids[:limit] for ids, limit in zip(rows, limits, strict=True)],
            logps=[[-1.0] * min(len(ids), limit) for ids, limit in zip(rows, limits, strict=True)],
            is_cut=[len(ids) > limit for ids, limit in zip(rows, limits, strict=True)],
        )


def play(tokenizer, script, rows, env=Digits, max_tokens=100, **settings):
    dialogue = Dialogue(env, **settings)
    turns = TurnTokenizer(tokenizer, [tokenizer.eos_token_id])
    return dialogue.play(rows, turns, script, max_tokens=max_tokens, eos_token_id=tokenizer.eos_token_id)


def test_turns_and_tokens_have_limits(tokenizer):
    """The second row ends by itself. The third and last turn of the first row is cut, and no reply follows."""
    script = Script(tokenizer, ["ab1", "xyzZ"], ["cdefg"], ["hij"])
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    first, second = play(tokenizer, script, rows, max_turns=3, max_turn_tokens=4, max_tokens=18)
    assert script.limits == [[4, 4], [4], [2]]
    assert script.histories == [["p", "q"], ["pab1~...1~"], ["pab1~...1~cdef~2~"]]
    text = tokenizer.decode(first.completion_ids)
    assert text == "ab1~...1~cdef~2~hi"
    assert [c for c, own in zip(text, first.is_own, strict=True) if not own] == list("~...1~~2~")
    assert first.logps == [-1.0 if own else 0.0 for own in first.is_own]
    assert (first.turns, first.is_cut, second.turns, second.is_cut) == (3, True, 1, False)
    assert tokenizer.decode(second.completion_ids) == "xyzZ"
    assert (first.reward, second.reward) == (1 / 9, 0.0)


def test_no_reply_follows_the_last_turn(tokenizer):
    """The episode ends after `max_turns`, even if there is room for more tokens."""
    (episode,) = play(tokenizer, Script(tokenizer, ["ab"], ["cd"], ["ef"]), [{"prompt": "p"}], max_turns=2)
    assert tokenizer.decode(episode.completion_ids) == "ab~..1~cd"
    assert episode.turns == 2


def test_a_reply_that_leaves_no_room_is_dropped(tokenizer):
    (episode,) = play(tokenizer, Script(tokenizer, ["abc"]), [{"prompt": "p"}], max_tokens=9)
    assert tokenizer.decode(episode.completion_ids) == "abc"  # with the reply "~...1~", it would have nine tokens
    assert (episode.turns, episode.is_over, episode.is_cut) == (1, True, False)


def test_copies_of_a_row_do_not_share_it(tokenizer):
    """An environment may modify its row; its siblings must not see that."""

    class Writes(Digits):
        def reset(self, row):
            row["prompt"] += "!"
            return super().reset(row)

    row = {"prompt": "p"}
    script = Script(tokenizer, ["X", "X"])
    play(tokenizer, script, [row, row], env=Writes)
    assert script.histories == [["p!", "p!"]]


# Environments that raise


class Fragile(Digits):
    """Fails as its row specifies."""

    def reset(self, row):
        self.fault = row["fault"]
        if self.fault == "reset":
            raise KeyError("no such game")
        return "" if self.fault == "empty" else super().reset(row)

    def step(self, text):
        if self.fault == "step":
            raise ZeroDivisionError("in step")
        return None if self.fault == "nothing" else [] if self.fault == "no pair" else super().step(text)

    def reward(self):
        return {"reward": None, "nan": float("nan")}.get(self.fault, 1.0)


@pytest.mark.parametrize("fault", ["reset", "empty", "step", "no pair", "reward"])
def test_an_exception_costs_its_own_episode(build_player, tokenizer, fault):
    """A failed episode has no reward, and the other rows are trained. If every episode fails, the run ends."""
    rows = ["none", "none", fault, "none"]
    columns = {"columns": {"fault": rows}, "num_iterations": 1, "beta": 0.0}
    trainer = build_player(Fragile, num_generations=2, per_device_train_batch_size=8, max_steps=1, **columns)
    trainer.train()
    assert log_of(trainer, "dialogue/errors") == [2.0]
    (part,) = trainer._buffered_inputs
    rewards = dict(zip(trainer._logs["prompt"], trainer._logs["rewards"]["dialogue_reward"], strict=True))
    assert sum(reward != reward for reward in rewards.values()) == 1  # NaN
    assert (part["completion_mask"].sum(dim=1) >= 1).all()
    many = {"columns": {"fault": [fault] * 4}, "num_iterations": 1}
    with pytest.raises(RuntimeError, match=r"Fragile raised .* in 8 of the last 8 episodes"):
        build_player(Fragile, max_steps=1, **many).train()


def test_nan_is_no_reward_and_no_failure(build_player):
    trainer = build_player(Fragile, max_steps=1, num_iterations=1, columns={"fault": ["nan", "none", "none", "none"]})
    trainer.train()
    assert log_of(trainer, "dialogue/errors") == [0.0]
    assert sum(reward != reward for reward in trainer._logs["rewards"]["dialogue_reward"]) in (0, 4)


# Refused combinations, and evaluation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share_prompt": False}, "Dialogue continues from the KV caches that shared sampling keeps"),
        ({"dead_groups": "resample"}, "dead_groups='resample' does not work with rollout_func"),
        ({"num_generations_max": 8}, "num_generations_max=8 does not work with rollout_func"),
        ({"replay_fraction": 0.5, "generation_kwargs": None}, "replay_fraction=0.5 does not work with rollout_func"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(build_player, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_player(**settings)


def test_limits_below_one_and_other_trainers(build, small_model):
    for name in ("max_turns", "max_turn_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            Dialogue(Digits, **{name: 0})
    with pytest.raises(TypeError, match="Dialogue needs GRPOExtTrainer, got GRPOTrainer"):
        build(small_model, trainer=GRPOTrainer, arguments={"rollout_func": Dialogue(Digits)}).train()


class Calculated(Calculator):
    """A calculator whose prompt already contains the first digit of the completion."""

    def reset(self, row):
        self.first_digit = row["question"][2]
        return f"{super().reset(row)} {self.first_digit}"

    def step(self, text):
        text, self.first_digit = self.first_digit + text, ""
        return super().step(text)


def test_results_of_the_calculator_are_used(tiny_model, tokenizer):
    """The embedded model adds digits correctly. If it stops at every "=" and gets the result from the calculator, its
    greedy text equals that of one uninterrupted generation. If the results are wrong, it continues from those."""
    questions = [("538+478=?", "1016"), ("120+345=?", "465"), ("999+101=?", "1100"), ("614+303=?", "917")]
    rows = [{"prompt": f"Question: {q}\nAnswer:", "question": q, "answer": answer} for q, answer in questions]
    prompts = [f"{row['prompt']} {row['question'][2]}" for row in rows]
    settings = {"max_new_tokens": 64, "temperature": 0.8}
    plain = complete(tiny_model, tokenizer, prompts, max_new_tokens=64)

    def played(env):
        return evaluate_dialogue(
            tiny_model, tokenizer, rows, Dialogue(env), stop_strings=["="], samples=2, batch_size=3, **settings
        )

    calculated = played(Calculated)
    assert calculated.completions == plain
    assert calculated.right == [True] * 4
    assert calculated.greedy.value == 1.0
    assert calculated.sampled.n == 4
    assert all(text.count("=") == 3 for text in plain)

    class Wrong(Calculated):
        def step(self, text):
            result, is_over = super().step(text)
            return (result if result is None else "7"), is_over

    wrong = played(Wrong)
    assert all(text.count("=7 ") == 3 for text in wrong.completions)
    assert wrong.right != calculated.right


def test_replies_count_in_no_normaliser_and_no_length(build_player, tokenizer):
    """The tokens of the environment, also if completions that were cut off are masked."""
    no_mark = {"suppress_tokens": [tokenizer.convert_tokens_to_ids(MARK), tokenizer.pad_token_id]}
    settings = {"mask_truncated_completions": True, "loss_type": "dapo", "num_iterations": 1, "max_steps": 1}
    trainer = build_player(generation_kwargs=no_mark | {"stop_strings": ["7"]}, **settings)
    trainer.train()
    (part,) = trainer._buffered_inputs
    own_BC = part["completion_mask"] * part["tool_mask"]
    assert own_BC.sum() < part["completion_mask"].sum()
    assert part["num_items_in_batch"] == own_BC.sum()
    ended = own_BC.sum(dim=1)[part["completion_mask"].any(dim=1)].float()
    assert log_of(trainer, "completions/mean_terminated_length") == [pytest.approx(ended.mean().item())]
