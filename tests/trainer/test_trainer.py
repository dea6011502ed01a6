"""The trainer against stock TRL, against itself with other micro-batches, and against arithmetic on its metrics."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo_ext import GRPOExtTrainer
from grpo_ext.report.run_reader import read_metrics
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS, share_of_digits
from tests.tools.training import adapter_of, log_of

TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LOSSES_AND_SCALINGS = thinned(
    [(loss, "group") for loss in TRL_LOSSES] + [("dapo", "batch"), ("dapo", "none")],
    [(loss, "group") for loss in ("bnpo", "dr_grpo", "dapo", "sapo")],
)


def assert_moved(before, after):
    for name, value in before.items():
        assert not torch.equal(value, after[name]), f"{name} did not move"


@pytest.mark.parametrize(
    ("loss_type", "scale_rewards"),
    slow_but(LOSSES_AND_SCALINGS, [("grpo", "group"), ("dapo", "batch")]),
)
def test_losses_of_trl_are_left_to_trl(build, small_model, tokenizer, loss_type, scale_rewards):
    """Same seed, same settings, no sharing: the adapter must be stock TRL's to the last bit. A failure means that an
    override changed something unrelated to it."""
    adapters = []
    for trainer_class in (GRPOTrainer, GRPOExtTrainer):
        trainer = build(
            copy.deepcopy(small_model),
            trainer=trainer_class,
            peft_config=random_lora(),
            **({"share_prompt": False} if trainer_class is GRPOExtTrainer else {}),
            loss_type=loss_type,
            scale_rewards=scale_rewards,
            beta=0.1,
            temperature=0.8,
            entropy_coef=0.01,
            max_grad_norm=0.5,
            disable_dropout=True,
        )
        start = adapter_of(trainer)
        trainer.train()
        adapters.append(adapter_of(trainer))
        assert_moved(start, adapters[-1])
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name


@pytest.mark.parametrize(
    "changes", slow_but([{"max_steps": 3}, {"num_iterations": 2, "max_steps": 4, "delta": 2.0}], [{"max_steps": 3}])
)
def test_cutting_a_batch_into_micro_batches_does_not_change_the_update(build, small_model, changes):
    """1 x 8, 2 x 4 and 8 x 1: same completions, same adapter. A token mean per micro-batch would differ here."""
    results = {}
    for size in (8, 4, 1):
        trainer = build(
            copy.deepcopy(small_model),
            peft_config=random_lora(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.5,
            **changes,
        )
        start = adapter_of(trainer)
        trainer.train()
        results[size] = adapter_of(trainer), log_of(trainer, "grad_norm"), log_of(trainer, "loss")
        assert_moved(start, results[size][0])
    for size in (4, 1):
        for name, value in results[8][0].items():
            torch.testing.assert_close(results[size][0][name], value, atol=2e-6, rtol=1e-4, msg=name)
        assert results[size][1] == pytest.approx(results[8][1], rel=1e-4)
        assert results[size][2] == pytest.approx(results[8][2], abs=1e-5)


def test_advantages_of_the_rollout_are_population_normalised(build, small_model):
    """The advantages that the update receives, against arithmetic on the logged rewards."""
    trainer = build(small_model, peft_config=random_lora(), max_steps=1)
    seen = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs["advantages"]) or compute_loss(model, inputs)
    trainer.train()
    rewards = torch.tensor(list(trainer._logs["rewards"]["share_of_digits"]), dtype=torch.float64).view(-1, 4)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    expected = (centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-8)).flatten().float()
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(seen).sort().values, expected.sort().values, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("score", [None, 0.1])
def test_unscorable_and_dead_groups_leave_no_trace(build, small_model, score):
    """If every reward is None or equal, and beta and entropy are off, no weight may change."""

    def no_signal(completions, **columns):
        return [score] * len(completions)

    trainer = build(small_model, reward=no_signal, peft_config=random_lora(), beta=0.0, entropy_coef=0.0)
    start = adapter_of(trainer)
    trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in adapter_of(trainer).items())
    assert log_of(trainer, "frac_dead_groups") == [1.0, 1.0]


def test_kl_is_zero_at_step_0_and_grows(build, small_model):
    """A fresh adapter (B = 0) is the reference itself; any other KL there means that a pass uses another model."""
    trainer = build(small_model, peft_config=random_lora(init_lora_weights=True), max_steps=4, learning_rate=1e-2)
    trainer.train()
    kl = log_of(trainer, "kl_sequence")
    assert abs(kl[0]) < 1e-9
    assert kl[-1] > 1e-4


def test_truncated_completions_can_be_masked(build, small_model):
    """If all completions are cut off and masked, there is no policy gradient and no NaN."""
    trainer = build(
        small_model, peft_config=random_lora(), mask_truncated_completions=True, max_completion_length=2, beta=0.1
    )
    trainer.train()
    assert all(math.isfinite(value) for value in log_of(trainer, "loss"))


def test_off_policy_mask_acts_on_the_sequence_objective(build, small_model):
    """A threshold that masks every bad completion that drifted changes the update; one that masks none does not."""
    results = []
    for threshold in (None, 1e9, -1e9):
        trainer = build(
            copy.deepcopy(small_model), peft_config=random_lora(), off_policy_mask_threshold=threshold, beta=0.0
        )
        trainer.train()
        results.append(adapter_of(trainer))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_metrics_file_holds_every_step(build, small_model):
    trainer = build(small_model, peft_config=random_lora(), max_steps=3)
    trainer.train()
    rows = read_metrics(Path(trainer.args.output_dir, "metrics.jsonl"))
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert {"reward", "kl", "kl_sequence", "entropy", "frac_dead_groups", "advantages/mean_abs"} <= set(row)
        phases = [row[f"time/{phase}"] for phase in ("generate", "reward", "reference", "update")]
        assert all(seconds > 0 for seconds in phases)
        # each phase is counted once: their sum is the step time of TRL, up to its own overhead
        assert sum(phases) == pytest.approx(row["step_time"], rel=0.1)


def test_default_arguments_work_and_a_stock_config_is_refused(build, small_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model.config._name_or_path = "someone/small"
    small_model.config.max_position_embeddings = 1024  # by default, completions have up to 512 tokens
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOExtTrainer(small_model, share_of_digits, None, rows, None, tokenizer, peft_config=random_lora())
    assert trainer.args.output_dir == "small-GRPO"
    assert trainer.args.loss_type == "grpo_sequence"
    with pytest.raises(TypeError, match="GRPOExtConfig, got GRPOConfig"):
        GRPOExtTrainer(small_model, share_of_digits, GRPOConfig("x", use_cpu=True, bf16=False), rows)


def test_chat_prompts_and_evaluation_work(build, small_model, tokenizer):
    """Messages in, messages out; TRL's own evaluation runs the objective without accumulation."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    try:
        trainer = build(
            small_model,
            peft_config=random_lora(),
            reward=lambda completions, **_: share_of_digits([c[0]["content"] for c in completions]),
            prompts=[[{"role": "user", "content": prompt}] for prompt in PROMPTS],
            per_device_eval_batch_size=8,
        )
        trainer.train()
        metrics = trainer.evaluate(trainer.train_dataset)
    finally:
        tokenizer.chat_template = None
    assert math.isfinite(metrics["eval_loss"])
    assert json.dumps(metrics["eval_reward"])
