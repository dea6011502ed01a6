"""Updates in chunks, against updates on one graph: the same adapter and the same metrics, in one pass over the rows."""

import copy

import pytest
import torch

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import slow_but
from tests.tools.models import random_lora
from tests.tools.training import adapter_of

LONG = {"max_steps": 3, "num_iterations": 2, "temperature": 0.8}
SETTINGS = {
    "sequence-level": LONG
    | {"loss_type": "grpo_sequence", "beta": 0.1, "delta": 2.0, "entropy_coef": 0.01, "off_policy_mask_threshold": 0.5},
    "k2": LONG | {"loss_type": "grpo", "beta": 0.1, "kl_estimator": "k2", "importance_sampling_level": "sequence"},
    "entropy target": LONG
    | {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_target": 4.0, "entropy_coef_delta": 0.05},
    "replay": LONG | {"loss_type": "grpo_sequence", "replay_fraction": 0.5, "beta": 0.0},
    "accumulated": LONG
    | {"loss_type": "bnpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1},
}


@pytest.fixture
def train(build, small_model):
    """`train(chunk_tokens=40)`: a trained trainer, and the adapter before and after."""

    def run(trainer=GRPOExtTrainer, **settings):
        options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.5} | settings
        trainer = build(copy.deepcopy(small_model), trainer=trainer, peft_config=random_lora(), **options)
        before = adapter_of(trainer)
        trainer.train()
        return trainer, before, adapter_of(trainer)

    return run


def metrics_of(trainer):
    """All logged values, by step and name."""
    timed = ("time/", "peak_memory", "step_time", "train_", "total_flos", "sampling/logp_gap")
    return {
        (i, name): value
        for i, row in enumerate(trainer.state.log_history)
        for name, value in row.items()
        if not name.startswith(timed)
    }


@pytest.mark.parametrize("name", slow_but(SETTINGS, ["sequence-level", "entropy target"]))
def test_adapter_and_metrics(train, name):
    whole, before, want = train(**SETTINGS[name])
    chunked, _, got = train(**SETTINGS[name], chunk_tokens=40)
    for parameter, value in want.items():
        moved = (value - before[parameter]).norm()
        assert moved > 0, parameter
        assert (got[parameter] - value).norm() < 1e-4 * moved, parameter
    assert metrics_of(chunked) == pytest.approx(metrics_of(whole), rel=1e-4, abs=1e-6, nan_ok=True)


class WithOwnLoss(GRPOExtTrainer):
    """Squares the mean of all log-probs of a micro-batch, which no chunk knows."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss + self.scored[0].mean().square()

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scored


class WithoutGradients:
    """Counts the tokens in forwards of the policy that keep no graph: sampling, the reference, and first passes."""

    def __init__(self, model):
        self.tokens = 0
        model.get_base_model().base_model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if not torch.is_grad_enabled():
            self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize(
    ("settings", "trainer", "reason"),
    [
        ({}, GRPOExtTrainer, None),
        ({"loss_type": "dapo"}, GRPOExtTrainer, None),
        ({"loss_type": "grpo", "top_entropy_quantile": 0.5}, GRPOExtTrainer, "top_entropy_quantile=0.5"),
        ({}, WithOwnLoss, "_compute_loss is overridden"),
    ],
    ids=["sequence-level", "dapo", "quantile", "own loss"],
)
def test_one_pass_if_the_loss_is_a_sum_over_rows(build, small_model, caplog, settings, trainer, reason):
    """Otherwise the result is that of one graph all the same, with two passes and a log line that gives the reason."""
    adapters, tokens = [], []
    for chunk_tokens in (None, 40):
        run = build(
            copy.deepcopy(small_model),
            trainer=trainer,
            peft_config=random_lora(),
            chunk_tokens=chunk_tokens,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            guards=False,
            **settings,
        )
        count = WithoutGradients(run.model)
        run.train()
        adapters.append(adapter_of(run))
        tokens.append(count.tokens)
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert (tokens[0] == tokens[1]) == (reason is None)
    warnings = [record.message for record in caplog.records if "runs its forward twice" in record.message]
    assert len(warnings) == (reason is not None)
    assert reason is None or reason in warnings[0]


def test_processes_wait_for_each_other_as_often_as_without_chunks(train):
    """With different numbers of chunks, they would otherwise wait forever."""

    class Counting(GRPOExtTrainer):
        def training_step(self, *args, **kwargs):
            self.collectives = getattr(self, "collectives", [])
            for name in ("gather", "reduce", "gather_for_metrics"):
                collective = getattr(type(self.accelerator), name).__get__(self.accelerator)

                def counted(*args, name=name, collective=collective, **kwargs):
                    self.collectives.append(name)
                    return collective(*args, **kwargs)

                setattr(self.accelerator, name, counted)
            return super().training_step(*args, **kwargs)

    for settings in (
        {"loss_type": "grpo_sequence", "beta": 0.1},
        {"loss_type": "grpo", "kl_estimator": "k1", "beta": 0.1},
    ):
        whole, chunked = (train(trainer=Counting, chunk_tokens=n, **settings)[0].collectives for n in (None, 40))
        assert whole == chunked
        assert whole


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "dapo"])
def test_small_gradients_survive_fp16(build, small_model, loss_type):
    """The backward of a chunk runs at the scale of the loss in fp16 training. Without it, these gradients would be 0 in
    float16, whose smallest number is 6e-8."""
    trainer = build(small_model, peft_config=random_lora(), loss_type=loss_type, beta=0.0, chunk_tokens=40)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["advantages"] = torch.linspace(-1e-6, 1e-6, len(inputs["advantages"]))

    def gradients(scaler):
        trainer.accelerator.scaler = scaler
        loss = trainer.compute_loss(trainer.model, inputs)
        (loss if scaler is None else scaler.scale(loss)).backward()
        found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        return found

    exact = gradients(None)
    with torch.autocast("cpu", torch.float16):
        scaled = gradients(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    for name, grad in exact.items():
        assert grad.norm() > 0
        assert (scaled[name] / 2**16 - grad).norm() < 0.05 * grad.norm(), name
