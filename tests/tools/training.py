"""Settings of the trainers in the tests, and functions that read and compare their results."""

import copy
import itertools
import re
from typing import Any

import pytest
import torch

from tests.tools.models import random_lora

# For every trainer in the tests: on the CPU in float32, quiet, one log line per step, nothing saved.
SETTINGS: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}

# For stock TRL and ours alike, since their defaults differ.
COMMON = {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.1, "temperature": 0.8, "entropy_coef": 0.01}
COMMON |= {"disable_dropout": True, "max_grad_norm": 0.5, "num_iterations": 2, "max_steps": 4}
COMMON |= {"optim": "sgd", "learning_rate": 0.5}


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters, by name."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def log_of(trainer: Any, name: str) -> list[float]:
    """The values logged under this name, in order."""
    return [row[name] for row in trainer.state.log_history if name in row]


def count_draws(trainer: Any) -> list[int]:
    """The number of rows in each call of the sampler from now on."""
    draws, generate = [], trainer._generate_single_turn

    def counted(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draws.append(len(prompt_ids))
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = counted
    return draws


def tokens_of_the_policy(inputs: dict[str, Any], tokenizer: Any, not_sampled: re.Pattern[str]) -> torch.Tensor:
    """A mask of shape (B, C), 1 on sampled tokens: all of a completion except what the pattern matches."""
    mask_BC = inputs["completion_mask"].clone()
    found = 0
    for row, ids in enumerate(inputs["completion_ids"]):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        starts = list(itertools.accumulate(map(len, pieces), initial=0))
        for match in not_sampled.finditer("".join(pieces)):
            mask_BC[row, starts.index(match.start()) : starts.index(match.end())] = 0
            found += 1
    assert found > 0
    return mask_BC


def record_updates(trainer: Any) -> dict[int, Any]:
    """Tokens and advantages of every micro-step of the run, by micro-step; filled during training."""
    seen, prepare_inputs = {}, trainer._prepare_inputs

    def watched(*args: Any) -> dict[str, Any]:
        inputs = prepare_inputs(*args)
        if trainer.model.training:
            seen[trainer._step] = inputs["completion_ids"].tolist(), inputs["advantages"].tolist()
        return inputs

    trainer._prepare_inputs = watched  # a wrapped `compute_loss` would keep dead groups
    return seen


def texts_of(trainer: Any, part: dict[str, Any]) -> list[tuple[str, str]]:
    """Prompt and completion of each row of a micro-batch."""
    decode = trainer.processing_class.batch_decode
    ids = part["prompt_ids"], part["completion_ids"]
    return list(zip(*(decode(of, skip_special_tokens=True) for of in ids), strict=True))


def train_on_a_copy(build, model, trainer, watch=None, **settings):
    """A trainer after training with COMMON settings, and its adapter before; `watch` is given the untrained trainer."""
    trainer = build(copy.deepcopy(model), trainer=trainer, **COMMON | {"peft_config": random_lora()} | settings)
    start = adapter_of(trainer)
    if watch is not None:
        watch(trainer)
    trainer.train()
    return trainer, start


def assert_same_training(ours, stock):
    """Compare adapter, loss and all metrics that both log, except times; ours must have shared its prompts."""
    assert ours.shares_prompts
    for name, value in adapter_of(stock).items():
        torch.testing.assert_close(adapter_of(ours)[name], value, atol=1e-5, rtol=1e-4, msg=name)
    rows = zip(ours.state.log_history[:-1], stock.state.log_history[:-1], strict=True)
    for our_row, stock_row in rows:
        assert set(stock_row) <= set(our_row)
        for name, value in stock_row.items():
            if "time" not in name:
                expected = value if value is None else pytest.approx(value, rel=2e-3, abs=2e-4, nan_ok=True)
                assert our_row[name] == expected, name


def loss_by_hand(trainer, inputs, mask_BC):
    """The loss of sequence-level GRPO (DeepSeekMath, arXiv:2402.03300) from the logits of padded rows, with epsilon 0.2
    and k3 weighted by the ratio of each token."""
    C = mask_BC.size(1)
    ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)

    def logps_of_all():
        logits_BTV = trainer.model(input_ids=ids_BT, attention_mask=attention_BT, position_ids=positions_BT).logits
        return (logits_BTV[:, -C - 1 : -1] / trainer.temperature).log_softmax(dim=-1)

    logps_BCV = logps_of_all()
    with torch.no_grad(), trainer.model.disable_adapter():
        ref_BCV = logps_of_all()
    targets_BC1 = inputs["completion_ids"].unsqueeze(2)
    logps_BC, ref_BC = (values.gather(2, targets_BC1).squeeze(2) for values in (logps_BCV, ref_BCV))
    log_ratio_BC = (logps_BC - inputs["old_per_token_logps"]) * mask_BC
    ratio_B, A_B = log_ratio_BC.sum(dim=1).exp(), inputs["advantages"]
    surrogate_B = torch.minimum(ratio_B * A_B, ratio_B.clamp(0.8, 1.2) * A_B)
    kl_BC = ((ref_BC - logps_BC).exp() - (ref_BC - logps_BC) - 1) * log_ratio_BC.exp()
    entropies_BC = -(logps_BCV.exp() * logps_BCV).sum(dim=2)
    entropy_B = (entropies_BC * mask_BC).sum(dim=1) / mask_BC.sum(dim=1)
    return -(surrogate_B - 0.1 * (kl_BC * mask_BC).sum(dim=1) + 0.01 * entropy_B).mean()
