"""What users build on the trainer: subclasses that override TRL's hooks, custom samplers, and callbacks that change
attributes of the trainer while it trains."""

import copy
import inspect
from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

import grpo_ext
from grpo_ext import GRPOExtTrainer
from tests.tools.models import random_lora
from tests.tools.training import adapter_of, log_of


def ones(completions, **columns):
    return [1.0] * len(completions)


class Bonus(GRPOExtTrainer):
    """A bonus that grows with the row: 0, 1/8, 2/8, ..., so no group is dead."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards + torch.arange(len(rewards), dtype=rewards.dtype).unsqueeze(1) / len(rewards)


def test_there_is_one_subclass_of_the_trainer():
    """A chain of subclasses would hide what a step does."""
    for module in walk_packages(grpo_ext.__path__, "grpo_ext."):
        if not module.name.endswith("__main__"):
            import_module(module.name)

    def subclasses(kind):
        return {sub for direct in kind.__subclasses__() for sub in {direct} | subclasses(direct)}

    assert {kind for kind in subclasses(GRPOTrainer) if kind.__module__.startswith("grpo_ext")} == {GRPOExtTrainer}


def test_the_constructor_is_that_of_trl():
    """Same parameters, order and defaults, and a type for each, which code completion and `help()` show."""
    ours, stock = (inspect.signature(kind.__init__).parameters for kind in (GRPOExtTrainer, GRPOTrainer))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [(p.name, p.kind, p.default) for p in stock.values()]
    assert all(p.annotation is not p.empty for p in list(ours.values())[1:])


@pytest.mark.parametrize("scale", ["population", "group", "batch", "none"])
def test_a_bonus_of_a_subclass_reaches_advantages_counts_and_metrics(build, small_model, scale):
    trainer = build(
        small_model, trainer=Bonus, reward=ones, peft_config=random_lora(), scale_rewards=scale, max_steps=1
    )
    trainer.train()
    assert log_of(trainer, "reward") == [1 + 3.5 / 8]
    assert log_of(trainer, "frac_dead_groups") == [0.0]
    assert log_of(trainer, "frac_groups/mixed") == [1.0]
    logged = list(trainer._logs["advantages"])
    assert logged[:4] == pytest.approx(logged[4:])
    # Within a group, the bonus is 0, 1/8, 2/8, 3/8 plus a constant.
    deviation = {"population": 1.25**0.5 / 8, "group": (5 / 3) ** 0.5 / 8, "batch": 6**0.5 / 8, "none": 1.0}[scale]
    assert logged[:4] == pytest.approx([(i - 1.5) / 8 / deviation for i in range(4)], rel=2e-3)


def test_a_bonus_is_added_once_if_stages_collect_the_rollout(build, small_model):
    """The stages see the bonus, so no group is dead, and it is not added a second time."""
    trainer = build(
        small_model, trainer=Bonus, reward=ones, peft_config=random_lora(), dead_groups="resample", max_steps=1
    )
    trainer.train()
    assert log_of(trainer, "reward") == [1 + 3.5 / 8]
    assert log_of(trainer, "resampled_groups") == [0.0]


class OwnSampler(GRPOExtTrainer):
    """Completes every prompt with its own first tokens, in four lengths."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [ids[: 1 + i % 4] for i, ids in enumerate(prompt_ids)], None


def own_generate(trainer):
    """Replace `model.generate` with one that ignores our sampler and repeats the last token of the prompt twice."""

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, input_ids[:, -1:], input_ids[:, -1:]], dim=1)

    trainer.model.get_base_model().generate = generate
    trainer.model.generate = generate


@pytest.mark.parametrize("own", ["subclass", "generate"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_iterations": 2}, {"generation_kwargs": {"stop_strings": "7"}}, {"dead_groups": "resample"}],
    ids=lambda settings: ", ".join(settings) or "default",
)
def test_a_sampler_of_the_user_works_without_log_probs(build, small_model, own, settings):
    """Guards against code that needs our sampler's log-probs and endings: it would crash or train on nothing."""
    kind = OwnSampler if own == "subclass" else GRPOExtTrainer
    trainer = build(small_model, trainer=kind, peft_config=random_lora(), **settings)
    if own == "generate":
        own_generate(trainer)
    before = adapter_of(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())
    lengths = log_of(trainer, "completions/mean_length")
    assert lengths == ([2.5] * len(lengths) if own == "subclass" else [2.0] * len(lengths))
    assert log_of(trainer, "sampling/logp_gap") == []


class Sets(TrainerCallback):
    """Sets attributes of the trainer after the first step."""

    def __init__(self, **attributes):
        self.attributes, self.trainer = attributes, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for name, value in self.attributes.items():
                setattr(self.trainer, name, value)


def train_and_set(build, model, *, attributes, **settings):
    callback = Sets(**attributes)
    settings = {"peft_config": random_lora()} | settings
    trainer = build(model, arguments={"callbacks": [callback]}, **settings)
    callback.trainer = trainer
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "grpo"])
def test_beta_and_entropy_coef_act_once_a_callback_sets_them(build, small_model, loss_type):
    """The gradient of the second step is that of a run with the new values from the start. Both runs have the same
    adapter then, since the learning rate of the first step is 0."""
    old, new = {"beta": 0.1, "entropy_coef": 0.0}, {"beta": 0.7, "entropy_coef": 0.3}
    settings = {"loss_type": loss_type, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}

    def second_norm(attributes, weights):
        run = train_and_set(build, copy.deepcopy(small_model), attributes=attributes, **weights, **settings)
        return log_of(run, "grad_norm")[1]

    changed = second_norm(new, old)
    assert changed == pytest.approx(second_norm({}, new), rel=1e-5)
    assert changed != pytest.approx(second_norm({}, old), rel=1e-2)


def test_a_temperature_acts_once_a_callback_sets_it(build, small_model):
    """It acts in sampling and in scoring: near 0, the policy's entropy is that of greedy decoding."""
    trainer = train_and_set(build, small_model, attributes={"temperature": 0.01}, max_steps=3)
    entropy = log_of(trainer, "entropy")
    assert entropy[0] > 1.0
    assert max(entropy[1:]) < 0.5
    assert trainer.generation_config.temperature == 0.01


@pytest.mark.parametrize(
    ("attributes", "settings", "message"),
    [
        ({"temperature": 0.5}, {"share_prompt": False}, "temperature was changed from 0.8 to 0.5, but prompts are not"),
        (
            {"temperature": 0.5},
            {"temperature_schedule": "linear", "temperature_end": 1.0},
            "temperature_schedule='linear' sets it before each rollout",
        ),
        (
            {"beta": 0.1},
            {"beta": 0.0, "peft_config": None},
            "beta was changed from 0 to 0.1, but this run was built without a reference",
        ),
    ],
)
def test_what_cannot_act_is_refused(build, small_model, attributes, settings, message):
    with pytest.raises(ValueError, match=message):
        train_and_set(build, small_model, attributes=attributes, **settings)


def test_scale_rewards_acts_once_a_callback_sets_it(build, small_model):
    """From the second step on, TRL normalises. Only our normalisation logs `advantages/mean_abs`."""
    trainer = train_and_set(build, small_model, attributes={"scale_rewards": "group"})
    assert len(log_of(trainer, "advantages/mean_abs")) == 1


def test_dead_groups_are_kept_once_they_have_a_gradient(build, small_model):
    """A run that skips dead groups raises `entropy_coef`: from then on, they count in the entropy bonus."""
    trainer = train_and_set(
        build,
        small_model,
        attributes={"entropy_coef": 0.1},
        reward=ones,
        beta=0.0,
        entropy_coef=0.0,
    )
    assert log_of(trainer, "grad_norm")[0] == 0.0
    assert log_of(trainer, "grad_norm")[1] > 0.0


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "grpo"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_beta_above_0_acts_from_the_next_rollout_on(build, small_model, loss_type, num_iterations):
    """An adapter has a reference, even if the run began without a KL. A rollout that the reference has not scored is
    trained on without a KL."""
    settings = {"loss_type": loss_type, "num_iterations": num_iterations, "max_steps": 3}
    trainer = train_and_set(build, small_model, attributes={"beta": 0.1}, beta=0.0, **settings)
    assert len(log_of(trainer, "kl")) == 3 - num_iterations
    assert log_of(trainer, "kl")[-1] != 0.0


class ScoresGoldAnswers(GRPOExtTrainer):
    """Scores other tokens in its rewards, with entropies."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        ids = torch.tensor([[5, 6, 7, 8, 9]] * len(prompts))
        with torch.no_grad():
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, torch.ones_like(ids), 3, compute_entropy=True
            )
        assert logps.shape == entropies.shape == (len(prompts), 3)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"replay_fraction": 0.5}], ids=str)
def test_other_rows_are_scored_as_they_are(build, small_model, settings):
    """Guards against taking them for rows of the rollout, whose log-probs are known."""
    trainer = build(small_model, trainer=ScoresGoldAnswers, peft_config=random_lora(), **settings)
    trainer.train()
    assert all(gap < 1e-4 for gap in log_of(trainer, "sampling/logp_gap"))


class MarksInputs(GRPOExtTrainer):
    """Marks each micro-batch that it has used."""

    def _compute_loss(self, model, inputs):
        self.seen = [*getattr(self, "seen", []), "used" in inputs]
        inputs["used"] = torch.tensor(True)
        return super()._compute_loss(model, inputs)


def test_what_a_loss_writes_into_a_micro_batch_stays(build, small_model):
    trainer = build(small_model, trainer=MarksInputs, peft_config=random_lora(), num_iterations=2)
    trainer.train()
    assert trainer.seen == [False, True]


def minus_log_probs(trainer, model, inputs):
    """A loss that makes all completions more likely, in dead groups too."""
    ids, mask = (
        torch.cat([inputs[f"{part}_{name}"] for part in ("prompt", "completion")], dim=1) for name in ("ids", "mask")
    )
    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
    return -(logps * inputs["completion_mask"]).sum() / len(logps)


class AddsLogProbs(GRPOExtTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + minus_log_probs(self, model, inputs)


@pytest.mark.parametrize("own", ["subclass", "method"])
def test_a_loss_of_the_user_sees_dead_groups(build, small_model, own):
    """They are skipped only under losses that give them no gradient. This one would get zeros instead of log-probs,
    without an error."""
    kind = AddsLogProbs if own == "subclass" else GRPOExtTrainer
    trainer = build(
        small_model, trainer=kind, reward=ones, peft_config=random_lora(), beta=0.0, entropy_coef=0.0, max_steps=1
    )
    if own == "method":
        trainer._compute_loss = lambda model, inputs: minus_log_probs(trainer, model, inputs)
    trainer.train()
    assert log_of(trainer, "frac_dead_groups") == [1.0]
    assert log_of(trainer, "grad_norm")[0] > 0.0


class InTwoCalls(GRPOExtTrainer):
    """Samples the rows of a rollout in two halves, to save memory."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        half = len(prompt_ids) // 2
        parts = [
            super(InTwoCalls, self)._generate_single_turn(ids, *args) for ids in (prompt_ids[:half], prompt_ids[half:])
        ]
        return [row for ids, _ in parts for row in ids], [row for _, logps in parts for row in logps]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_rollout_may_be_sampled_in_parts(build, small_model, num_iterations):
    trainer = build(small_model, trainer=InTwoCalls, peft_config=random_lora(), num_iterations=num_iterations)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "hook", ["_generate", "_calculate_rewards", "_generate_and_score_completions", "compute_loss", "_compute_loss"]
)
def test_hooks_that_are_wrapped_on_the_object_leave_no_trace_of_the_worst_case_step(build, small_model, hook):
    """Profilers wrap them in this way. Metrics and completions of that step must not appear among those of the run."""
    trainer = build(small_model, peft_config=random_lora(init_lora_weights=True), guards=True, kl_estimator="exact")
    method = getattr(trainer, hook)
    setattr(trainer, hook, lambda *args, **kwargs: method(*args, **kwargs))
    before = {name: list(values) for name, values in trainer._metrics["eval"].items()}
    trainer.preflight()
    assert trainer._metrics["eval"] == before
    assert len(trainer._logs["completion"]) == 0
    trainer.train()
    assert trainer.state.global_step == 2


class WithRowsOfPython(GRPOExtTrainer):
    """Entries that are lists or None, as TRL's own shuffling and splitting accept them."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(dim=1).tolist()
        return output | {"lengths": lengths, "nothing": None}

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            assert inputs["lengths"] == inputs["completion_mask"].sum(dim=1).tolist()
            assert inputs["nothing"] is None
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_outputs_of_a_rollout_that_are_no_tensors(build, small_model):
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = build(small_model, trainer=WithRowsOfPython, peft_config=random_lora(), **rows)
    trainer.train()
    assert trainer.state.global_step == 2
