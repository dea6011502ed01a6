"""What is watched during a run: each finding is provoked in training, and says what happened, why, and what to do."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from grpo_ext import GRPOExtTrainer
from grpo_ext.checkpoints.best import BestAdapter, read_best
from grpo_ext.checks.watch import Watch
from grpo_ext.memory.counter import MemoryCounter
from tests.tools.models import random_lora, small_llama
from tests.tools.reward_functions import share_of_digits
from tests.tools.training import adapter_of, log_of


def fresh_lora():
    """An adapter that leaves the model unchanged until the first update."""
    return random_lora(init_lora_weights=True)


def guarded(build, model, **settings):
    return build(model, **{"guards": True, "peft_config": fresh_lora()} | settings)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "grpo_ext.checks.watch"]


def test_a_healthy_run_causes_no_warning(build, tiny_model, caplog):
    trainer = guarded(build, tiny_model, max_steps=3, num_iterations=2, learning_rate=1e-4)
    trainer.train()
    assert not warnings_of(caplog)
    assert abs(log_of(trainer, "kl")[0]) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"beta": 0.0, "log_kl": True}, {"kl_estimator": "exact"}])
def test_a_reference_that_is_not_the_starting_policy(build, small_model, settings):
    """A KL to another model pulls the policy away from where it began, for the whole run (TRL #3194, #4723)."""
    with pytest.raises(
        RuntimeError, match=r"KL at step 0 is 0\.0\d+ nats per token, should be 0: the reference is not"
    ):
        guarded(build, small_model, peft_config=random_lora(), **settings).train()


NOISE = {"neftune_noise_alpha": 5.0}
PREFIX = {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)}


@pytest.mark.parametrize("settings", [NOISE, PREFIX])
def test_a_policy_that_may_differ_from_the_reference(build, small_model, settings):
    """TRL trains NEFTune and prefix tuning with a KL. They differ from the reference from the start, by design."""
    trainer = guarded(build, small_model, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert abs(log_of(trainer, "kl")[0]) > 1e-3


def test_an_adapter_that_does_not_move(build, small_model):
    """If the optimizer holds other parameters, loss and rewards look as in any run (TRL #6700)."""
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    trainer = guarded(build, small_model, arguments={"optimizers": (elsewhere, None)})
    with pytest.raises(RuntimeError, match="Step 1: no trainable parameter moved in an update that had a gradient"):
        trainer.train()


def equal(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize("settings", [{"warmup_steps": 1}, {"beta": 0.0, "entropy_coef": 0.0, "reward": equal}])
def test_a_step_that_should_not_move_anything(build, small_model, settings):
    """A learning rate that warms up from 0 is not an error, nor are groups without a signal."""
    trainer, adapters = guarded(build, small_model, **settings), []
    step = trainer.training_step
    trainer.training_step = lambda *args: (adapters.append(adapter_of(trainer)), step(*args))[1]
    trainer.train()
    assert trainer.state.global_step == len(adapters) == 2
    before, after_first = adapters
    assert all(torch.equal(after_first[name], value) for name, value in before.items())


class Blows:
    """Share of digits, so large in these steps that the gradient overflows."""

    __name__ = "blows"

    def __init__(self, *steps):
        self._bad = steps

    def __call__(self, completions, trainer_state, **columns):
        factor = 1e38 if trainer_state.global_step + 1 in self._bad else 1.0
        return [factor * (0.1 + score) for score in share_of_digits(completions)]


def test_a_nonfinite_update_is_skipped(build, small_model, caplog):
    """One NaN in the gradient puts NaN into every weight. The rest of the run is lost, and logs hide it (TRL #6702)."""
    trainer = guarded(build, small_model, reward=Blows(2), scale_rewards="none", max_steps=3)
    adapters = []

    def training_step(*args, **kwargs):
        adapters.append(adapter_of(trainer))
        return step(*args, **kwargs)

    step, trainer.training_step = trainer.training_step, training_step
    trainer.train()
    adapters.append(adapter_of(trainer))

    def moved(a, b):
        return any(not torch.equal(adapters[a][name], adapters[b][name]) for name in adapters[a])

    assert (moved(0, 1), moved(1, 2), moved(2, 3)) == (True, False, True)
    assert all(value.isfinite().all() for value in adapters[3].values())
    (said,) = warnings_of(caplog)
    assert "Step 2: the loss or its gradient is not finite. The update is skipped, and its batch is in" in said
    assert log_of(trainer, "nonfinite/skipped") == [1.0, 1.0]
    folder = Path(trainer.args.output_dir, "nonfinite", "step-2")
    saved = load_file(folder / "rollout-0.safetensors")
    assert json.loads((folder / "settings.json").read_text()) == {"step": 2, "micro_batches": 1}
    assert saved["0.completion_ids"].shape[0] == 8
    assert saved["0.advantages"].abs().max() > 1e30


def test_the_batch_of_several_micro_batches_is_saved(build, small_model):
    """They share the number of tokens of the rollout, one tensor, which a safetensors file cannot hold twice."""
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = guarded(build, small_model, reward=Blows(1), scale_rewards="none", **rows)
    trainer.train()
    assert trainer.state.global_step == 2
    saved = load_file(Path(trainer.args.output_dir, "nonfinite", "step-1", "rollout-0.safetensors"))
    assert saved["0.num_items_in_batch"] == saved["1.num_items_in_batch"] > 0


THIRD = r"Step {}: .* it is the third one in a row\. Lower learning_rate \(now 0\.001\)"


def test_the_third_nonfinite_update_in_a_row_stops_the_run(build, small_model):
    """Three bad batches in ten thousand steps are no reason to stop a run. Three in a row are."""
    trainer = guarded(build, small_model, reward=Blows(1, 3, 4, 6, 7, 8), scale_rewards="none", max_steps=9)
    with pytest.raises(RuntimeError, match=THIRD.format(8)):
        trainer.train()


class StopAt(TrainerCallback):
    """Saves and ends a session after this step."""

    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self._step


@pytest.mark.parametrize("guards_before", [True, False])
def test_a_resumed_session_continues_the_count(build, tokenizer, guards_before):
    """Otherwise, a run that is restarted whenever it stops would skip every update forever. A checkpoint without these
    counts, from a session without a watch or an earlier version, can be resumed too."""
    settings = {"scale_rewards": "none", "max_steps": 9, "save_strategy": "steps", "save_steps": 100}
    first = guarded(build, small_llama(tokenizer), reward=Blows(*[1] * guards_before), guards=guards_before, **settings)
    first.add_callback(StopAt(1))
    first.train()
    second = guarded(build, small_llama(tokenizer), reward=Blows(2, 3, 4), **settings)
    with pytest.raises(RuntimeError, match=THIRD.format(3 if guards_before else 4)):
        second.train(resume_from_checkpoint=True)


def test_a_second_training_starts_the_count_again(build, small_model):
    trainer = guarded(build, small_model, reward=Blows(1, 2), scale_rewards="none", max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_skipped_update_in_fp16(build, small_model, caplog, max_grad_norm):
    """The gradient scaler of fp16 raises an assertion in an update if it has seen no gradient, and the gradients of a
    skipped update are already cleared. The test runs the scaler on the CPU, for a model that stays in float32."""
    trainer = guarded(build, small_model, reward=Blows(2), scale_rewards="none", max_steps=3)
    trainer.args.max_grad_norm = max_grad_norm
    accelerator = trainer.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=8.0), True
    states = accelerator.state
    states._mixed_precision, before = "fp16", states._mixed_precision
    try:
        trainer.train()
    finally:
        states._mixed_precision = before
    assert trainer.state.global_step == 3
    assert len(warnings_of(caplog)) == 1
    assert "Step 2: the loss or its gradient is not finite" in warnings_of(caplog)[0]


def test_comparing_the_parameters_takes_little_memory():
    """A copy of all of them in float64 would be 12 GB for full fine-tuning of 1.5B parameters, at the start of each
    run, after a check that the step just fits."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)))  # 16 MiB each
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(device=torch.device("cpu")))
    watch = Watch(trainer, train_metrics=dict, micro_batches=list)
    with MemoryCounter() as counter:
        watch.on_train_begin(None, TrainerState(), None)
    assert 0 < counter.peak < 2048 * 2048 * 8  # less than one of the twelve in float64


class EndsEarlyIfAsked(GRPOExtTrainer):
    """All completions of a rollout are truncated; those of a resampling round, a few rows, end at once."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        end = self.eos_token_ids[0]
        return [[5] * 12 if len(prompt_ids) == 8 else [5, end] for _ in prompt_ids], None


def only_the_first_group_is_mixed(completions, **columns):
    return [float(row == 0 and len(completions) == 8) for row in range(len(completions))]


def test_truncation_is_judged_by_the_whole_rollout(build, small_model, caplog):
    """With resampling, TRL's metric covers only the last round, a few rows that may not even be used."""
    trainer = guarded(
        build,
        small_model,
        trainer=EndsEarlyIfAsked,
        reward=only_the_first_group_is_mixed,
        dead_groups="resample",
        max_resample_rounds=1,
        max_steps=6,
    )
    trainer.train()
    said = [line for line in warnings_of(caplog) if "were cut off at" in line]
    assert len(said) == 1
    assert "Step 5: 100% of completions" in said[0]


def test_being_right_depends_on_the_highest_reward(build, small_model):
    """With a reward of up to 10, a group in which everyone earns 3 is not all right, and needs no harder problems."""

    def points(completions, trainer_state, **columns):
        return [10.0 if trainer_state.global_step == 0 and row == 0 else 3.0 for row in range(len(completions))]

    trainer = guarded(build, small_model, reward=points, max_steps=2)
    trainer.train()
    assert log_of(trainer, "frac_groups/mixed") == [0.5, 0.0]
    assert log_of(trainer, "frac_groups/all_right") == [0.0, 0.0]
    assert log_of(trainer, "frac_groups/all_wrong") == [0.5, 1.0]


def test_truncated_completions_are_reported(build, small_model, tokenizer, caplog):
    """Rewards for the end of a completion then stay 0 forever (TRL #5697)."""
    never = {"suppress_tokens": [tokenizer.eos_token_id]}
    guarded(build, small_model, max_completion_length=3, max_steps=8, generation_kwargs=never).train()
    (said,) = warnings_of(caplog)
    assert "Step 5: 100% of completions were cut off at 3 tokens, with more than 90% in 5 rollouts in a row" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worth", "advice"), [(1.0, "already solves these problems: use harder"), (0.0, "use easier problems")]
)
def test_dead_groups_are_reported(build, small_model, caplog, worth, advice):
    def always(completions, **columns):
        return [worth] * len(completions)

    guarded(build, small_model, reward=always, max_steps=21).train()
    said = [line for line in warnings_of(caplog) if "rollouts in a row every group" in line]
    assert len(said) == 1
    assert "Step 20:" in said[0]
    assert advice in said[0]


def test_a_kl_above_its_limit_stops_the_run(build, small_model, caplog):
    """The run ends with a checkpoint instead of an error, since what it has learned may be good."""
    trainer = guarded(build, small_model, kl_stop=0.001, learning_rate=0.05, max_steps=20, save_strategy="steps")
    trainer.train()
    steps = trainer.state.global_step
    assert 1 < steps < 20
    assert f"Step {steps}: the KL to the reference is" in warnings_of(caplog)[-1]
    assert "above kl_stop=0.001" in warnings_of(caplog)[-1]
    assert Path(trainer.args.output_dir, f"checkpoint-{steps}").is_dir()
    assert max(log_of(trainer, "kl")[:-1]) <= 0.001 < log_of(trainer, "kl")[-1]


# The best adapter


def train_with_accuracies(build, model, accuracies, **settings):
    """A run in which these held-out accuracies are logged before the first step and after each."""
    trainer, adapters = guarded(build, model, max_steps=len(accuracies) - 1, **settings), []

    class Measured(BestAdapter):
        def on_step_end(self, args, state, control, **kwargs):
            adapters.append(adapter_of(trainer))
            trainer.log_alone({"heldout/pass@1": accuracies[state.global_step]})

    trainer.add_callback(Measured(trainer))
    trainer.log_alone({"heldout/pass@1": accuracies[0]})
    trainer.train()
    return trainer, adapters


def test_the_best_adapter_is_kept(build, small_model, tokenizer):
    """The last adapter is not the best one if a run goes on for too long."""
    trainer, adapters = train_with_accuracies(build, small_model, [0.1, 0.3, 0.8, 0.5])
    folder = Path(trainer.args.output_dir, "best")
    assert read_best(trainer.args.output_dir) == {"step": 2, "pass@1": 0.8}
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt") or path.name == "ref"]
    loaded = PeftModel.from_pretrained(small_llama(tokenizer), folder)
    values = {name.replace(".default", ""): value for name, value in loaded.named_parameters() if "lora" in name}
    for name, value in adapters[1].items():
        assert torch.equal(values[name.replace(".default", "")], value), name
    assert any(not torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[1])


def test_no_adapter_is_kept_unless_it_beats_the_start(build, small_model):
    trainer, _ = train_with_accuracies(build, small_model, [0.5, 0.3, 0.4])
    assert read_best(trainer.args.output_dir) is None
    assert not Path(trainer.args.output_dir, "best").exists()


def test_a_new_run_does_not_inherit_the_best_of_another(build, small_model, tokenizer, caplog):
    train_with_accuracies(build, small_model, [0.1, 0.9])
    trainer, _ = train_with_accuracies(build, small_llama(tokenizer), [0.1, 0.2])
    assert f"{trainer.args.output_dir}/best is deleted: its adapter, of step 1, is not of this run." in caplog.text
    assert read_best(trainer.args.output_dir) == {"step": 1, "pass@1": 0.2}
    assert [path.name for path in Path(trainer.args.output_dir).glob("best*")] == ["best"]
    trainer, _ = train_with_accuracies(build, small_llama(tokenizer), [0.5, 0.2])
    assert read_best(trainer.args.output_dir) is None
