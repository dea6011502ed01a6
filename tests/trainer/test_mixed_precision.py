"""bf16 autocast, which is TRL's default on a GPU, here on the CPU: every loss with every kind of reference, on shared
prompts and on TRL's plain path."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.training import adapter_of, log_of

LOSSES = ("grpo_sequence", "grpo", "dapo")
REFERENCES = {
    "none": {"beta": 0.0},
    "fixed": {"beta": 0.1},
    "logged": {"beta": 0.0, "log_kl": True},
    "following": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
}
KINDS = ("adapter", "whole model")
CASES = list(itertools.product(LOSSES, REFERENCES, KINDS))
# Half of them hold every pair of values.
OTHERS = [
    (loss, reference, kind)
    for (i, loss), (j, reference), (k, kind) in itertools.product(*map(enumerate, (LOSSES, REFERENCES, KINDS)))
    if (i + j) % 2 != k
]


class GivenCompletions(GRPOExtTrainer):
    """Completes each prompt with its own first tokens, in four lengths: the same in any precision."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [ids[: 2 + i % 4] for i, ids in enumerate(prompt_ids)], None


@pytest.fixture
def train(build, tokenizer, tmp_path):
    small_llama(tokenizer).save_pretrained(tmp_path / "base")

    def run(kind, **settings):
        """The update of all trainable parameters as one vector, and the trainer."""
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")  # TRL loads the reference from its path
        peft_config = random_lora() if kind == "adapter" else None
        settings = {"bf16": True, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2} | settings
        trainer = build(model, trainer=GivenCompletions, peft_config=peft_config, reward=by_length, **settings)
        before = adapter_of(trainer)
        trainer.train()
        after = adapter_of(trainer)
        return torch.cat([(after[name] - before[name]).flatten() for name in before]), trainer

    return run


def test_continuous_batching_leaves_the_adapter_in_float32(build, small_model):
    """TRL casts the whole model to bfloat16 for every rollout, and the adapter would stay rounded."""
    trainer = build(
        small_model,
        peft_config=random_lora(),
        bf16=True,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 64, "max_batch_tokens": 64},  # else most of the memory
        learning_rate=0.0,
        max_steps=1,
    )
    before = adapter_of(trainer)
    trainer.train()
    for name, value in adapter_of(trainer).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name


def by_length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("loss_type", "reference", "kind"), slow_but(thinned(CASES, OTHERS), [("grpo_sequence", "fixed", "whole model")])
)
def test_shared_prompts_train_as_the_plain_path_does(train, loss_type, reference, kind):
    """Guards against a reference model that cannot be prepared in mixed precision, because accelerate wraps its
    forward. bfloat16 rounds to 3 digits; the two updates agree to 5%."""
    settings = {"loss_type": loss_type, **REFERENCES[reference]}
    plain, _ = train(kind, share_prompt=False, **settings)
    for chunk_tokens in (None, 20):
        shared, trainer = train(kind, chunk_tokens=chunk_tokens, **settings)
        assert trainer.shares_prompts
        assert (shared - plain).norm() < 0.05 * plain.norm(), chunk_tokens
        kl = log_of(trainer, "kl")
        if reference == "none":
            assert kl == []
        elif kind == "whole model":  # a random adapter starts away from the backbone
            assert abs(kl[0]) < 1e-2


def test_exact_kl(train):
    """The exact KL is the same in both precisions. It is a difference of two large sums, so bfloat16 costs more."""
    exact, trainer = train("adapter", kl_estimator="exact", beta=0.3)
    whole, _ = train("adapter", kl_estimator="exact", beta=0.3, bf16=False)
    assert trainer.parts.reference_kl.is_exact
    assert (exact - whole).norm() < 0.2 * whole.norm()
