"""The gradient of a loss, computed chunk by chunk, against one graph over all rows."""

import pytest
import torch

from tests.tools.architectures import ARCHITECTURES, IN_FLOAT32, random_model
from tests.tools.lanes import slow_but
from tests.tools.scoring import padded_batch, scoring_batch_of

CHUNKS = {
    "several rows": 700,
    "one row, with the graph of the prompt": 165,
    "one row, with the shorter prompt": 110,
    "segments of a prompt": 24,
    "segments of a completion": 5,
}


def loss_of(scores):
    """A sum over rows that is not linear in the scores; its normaliser is the number of rows."""
    rows_B = torch.arange(1.0, len(scores.logps_BC) + 1)
    ratios_B = (scores.logps_BC - scores.logps_BC.detach()).sum(dim=1).exp() * scores.logps_BC.sum(dim=1)
    return (rows_B * (ratios_B.square() + scores.entropies_BC.square().sum(dim=1))).mean()


def adapter_gradients(model, loss):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("architecture", slow_but(ARCHITECTURES, ["llama", "gemma3", "qwen3_next"]))
def test_equals_one_graph(architecture):
    """In float64: scores to 1e-6 (the head runs in float32), gradients to 1e-6 relative; 5e-5 if parts of the model run
    in float32."""
    model = random_model(architecture)
    bound = 5e-5 if architecture in IN_FLOAT32 else 1e-6
    inputs = padded_batch()
    whole = model(scoring_batch=scoring_batch_of(*inputs))
    wanted = adapter_gradients(model, loss_of(whole))
    for name, chunk_tokens in CHUNKS.items():
        scores = model(scoring_batch=scoring_batch_of(*inputs, chunk_tokens=chunk_tokens, loss=loss_of))
        assert scores.loss_gradient.item() == 0
        for ours, want in ((scores.logps_BC, whole.logps_BC), (scores.entropies_BC, whole.entropies_BC)):
            torch.testing.assert_close(ours, want.detach(), atol=bound, rtol=0)
        for parameter, grad in adapter_gradients(model, 3 * scores.loss_gradient).items():
            error = (grad - 3 * wanted[parameter]).norm() / (3 * wanted[parameter]).norm()
            assert error < bound, (name, parameter, error.item())


def tokens_run(model, **settings):
    """The number of tokens in all forwards of the backbone, for scores and gradients of one batch."""
    counts = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batch = scoring_batch_of(*padded_batch(), **settings)
    scores = model(scoring_batch=batch)
    adapter_gradients(model, loss_of(scores) if scores.loss_gradient is None else scores.loss_gradient)
    hook.remove()
    return sum(counts)


def test_nothing_runs_twice_except_long_prompts():
    """A chunk of one row has room for the graph of its prompt: as many tokens as one graph over all rows, except for
    padding, which that packs away. Chunks that are shorter than the prompts run the prompts once more."""
    model = random_model("llama")
    prompts = 149 + 89
    rows = sum((12, 9, 7, 2, 12, 5, 3))  # a forward has at least two tokens
    assert tokens_run(model, chunk_tokens=162, loss=loss_of) == prompts + rows
    assert tokens_run(model, chunk_tokens=24, loss=loss_of) == 2 * prompts + rows
    assert tokens_run(model, chunk_tokens=24) == 2 * (prompts + rows)


def test_a_loss_that_reads_only_log_probs():
    """Scores that the loss does not read have no gradient, and no backward through their part of the head."""
    model = random_model("llama")
    inputs = padded_batch()

    def of_logps(scores):
        return scores.logps_BC.square().sum()

    whole = model(scoring_batch=scoring_batch_of(*inputs))
    wanted = adapter_gradients(model, of_logps(whole))
    scores = model(scoring_batch=scoring_batch_of(*inputs, chunk_tokens=24, loss=of_logps))
    for parameter, grad in adapter_gradients(model, scores.loss_gradient).items():
        torch.testing.assert_close(grad, wanted[parameter], rtol=1e-6, atol=1e-6 * wanted[parameter].abs().max().item())


@pytest.mark.parametrize(("chunk_tokens", "forwards"), [(10**6, 2), (600, 2 * 2), (300, 4 * 2)])
def test_groups_with_prompts_of_equal_length_share_a_chunk(chunk_tokens, forwards):
    """Four prompts of 40 tokens with 3 completions each, at most 12 tokens long. A group counts 3 * 52 + 40 tokens."""
    model = random_model("llama")
    inputs = padded_batch(prompt_lengths=(40,) * 4, lengths=((12, 12, 12),) * 4)
    wanted = adapter_gradients(model, loss_of(model(scoring_batch=scoring_batch_of(*inputs))))
    counts = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(lambda *_: counts.append(1))
    scores = model(scoring_batch=scoring_batch_of(*inputs, chunk_tokens=chunk_tokens, loss=loss_of))
    hook.remove()
    assert len(counts) == forwards
    for parameter, grad in adapter_gradients(model, scores.loss_gradient).items():
        error = (grad - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-6, (parameter, error.item())
