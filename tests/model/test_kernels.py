"""`use_kernels=True` of transformers, which replaces layers with kernels of the Hub: all passes run the replacements.

The kernels themselves need a GPU and the Hub. Here, layers are replaced with visibly different ones.
"""

import types

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import is_kernels_available
from trl import GRPOTrainer

import grpo_ext.recipes.math as recipe
from grpo_ext import GRPOExtTrainer
from grpo_ext.model.load import load_tokenizer
from grpo_ext.model.unwrap import base_of
from grpo_ext.recipe import build_problems, build_trainer
from tests.tools.models import random_lora
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import share_of_digits
from tests.tools.training import assert_same_training, log_of, train_on_a_copy

USE_KERNELS = {"model_init_kwargs": {"use_kernels": True}}


def norm(self, hidden_states):
    """A larger output than that of the layer, and a smaller one in evaluation mode, which has kernels of its own."""
    scale = 1.3 if self.training else 0.7
    normed = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return scale * self.weight * normed


def mlp(self, x):
    """Without its activation."""
    return self.down_proj(self.gate_proj(x) * self.up_proj(x))


def test_sampling_and_scoring_run_replaced_layers(build, small_model):
    """Replaced as `kernelize` does, by another `forward` on the layer. Guards against a pass that runs the class's own
    forward or another mode: the sampler's log-probs would then not be those of the update. With prompts shared or not,
    the adapter is the same."""
    for module in small_model.modules():
        forward = {LlamaRMSNorm: norm, LlamaMLP: mlp}.get(type(module))
        if forward is not None:
            module.forward = types.MethodType(forward, module)
    ours, _ = train_on_a_copy(build, small_model, GRPOExtTrainer)
    stock, _ = train_on_a_copy(build, small_model, GRPOTrainer)
    assert_same_training(ours, stock)
    gaps = log_of(ours, "sampling/logp_gap")
    assert gaps
    assert max(gaps) < 1e-3


class Norm(torch.nn.Module):
    forward = norm


class InMemory:
    """A repository of one layer."""

    layer_name = "Norm"

    def load(self):
        return Norm


@pytest.mark.skipif(not is_kernels_available(), reason="needs the package kernels in the version of transformers")
def test_layers_that_transformers_replaces(build):
    """With the flag, from loading the model to the last update."""
    from kernels import use_kernel_mapping

    with use_kernel_mapping({"RMSNorm": {"cpu": InMemory()}}):
        trainer = build(str(TINY_MODEL), peft_config=random_lora(), num_iterations=2, max_steps=4, **USE_KERNELS)
        trainer.train()
        norms = [module for module in trainer.model.modules() if type(module) is LlamaRMSNorm]
        assert norms
        assert all(module.forward.__func__ is norm for module in norms)
    gaps = log_of(trainer, "sampling/logp_gap")
    assert gaps
    assert max(gaps) < 1e-3


def in_a_script(build, tmp_path):
    return build(str(TINY_MODEL), peft_config=random_lora(), **USE_KERNELS)


def in_a_recipe(build, tmp_path):
    flags = ["--model_init_kwargs", '{"use_kernels": true}', "--output_dir", str(tmp_path), "--reward_workers", "0"]
    script_args, args, model_args = recipe.parse(flags)
    tokenizer = load_tokenizer(model_args)
    problems = build_problems(script_args, args, tokenizer)
    return build_trainer(share_of_digits, problems, tokenizer, args, model_args)


@pytest.mark.parametrize("load", [in_a_script, in_a_recipe])
def test_the_flag_reaches_transformers(load, build, tmp_path):
    """Guards against a run that silently has no kernels. Without the package, transformers refuses the flag."""
    if is_kernels_available():
        assert base_of(load(build, tmp_path).model).use_kernels
    else:
        with pytest.raises(ValueError, match="Kernels are not available"):
            load(build, tmp_path)
