"""Held-out accuracy with 95% intervals: greedy pass@1, sampled pass@1 and pass@k, and by difficulty or category.

In: a model, problems (rows with `prompt` and the columns of the reward) and a reward that gives 1.0 to a right
completion. Out: an `Evaluation`, for example greedy 0.12 [0.08, 0.16], sampled 0.41 [0.36, 0.48], pass@8 0.98 on 256
problems.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing

from grpo_ext.console.terminal import bar
from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.install import (
    has_sharded_parameters,
    shared_sampling,
    stop_strings_of,
    why_sampling_unsupported,
    why_sharing_unsupported,
)
from grpo_ext.evaluation.estimates import Estimate, pass_at_k
from grpo_ext.model.chat import tokenize_prompt
from grpo_ext.model.unwrap import base_of

logger = get_logger(__name__)

Problem = dict[str, Any]
GeneratedText = str | list[dict[str, str]]
Reward = Callable[..., list[float | None]]

# Accuracy is split by these columns of the problems if they have between 2 and MAX_KINDS different values.
KIND_COLUMNS = ("difficulty", "level", "category", "subject", "type")
MAX_KINDS = 12


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        greedy: pass@1 of the greedy completions.
        sampled: pass@1 at the sampling temperature, mean over `k` samples; None if `k` is 0.
        pass_at_k: share of problems that at least one of `k` samples solves; None if `k` is below 2.
        k: number of samples per problem.
        completions: the greedy completion of each problem.
        right: whether each greedy completion is right.
        shares: share of right samples per problem; empty if `k` is 0.
        pass_at: k -> pass@k, for the powers of two above 1 and below the number of samples, and for that number.
        kinds: column -> value -> greedy pass@1 of the problems with that value, for `KIND_COLUMNS`.
        right_lenient: whether each greedy completion is right if its format is ignored; empty if that is not known.
        lenient, lenient_sampled: `greedy` and `sampled` with the format ignored; None if that is not known.
        problems_digest: `digest_of` the problems. Two evaluations can be compared if theirs are equal.
    """

    greedy: Estimate
    sampled: Estimate | None
    pass_at_k: Estimate | None
    k: int
    completions: list[GeneratedText]
    right: list[bool]
    shares: list[float] = field(default_factory=list)
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    kinds: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    right_lenient: list[bool] = field(default_factory=list)
    lenient: Estimate | None = None
    lenient_sampled: Estimate | None = None
    problems_digest: str = ""


def digest_of(problems: Sequence[Problem]) -> str:
    """A digest of the prompts of these problems, in order."""
    prompts = json.dumps([problem["prompt"] for problem in problems])
    return hashlib.sha256(prompts.encode()).hexdigest()[:16]


@contextmanager
def evaluation_mode(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """A context for generating without gradients and dropout, with the KV cache on. Mode and random state are restored
    at its end."""
    was_training = model.training
    device = model.device
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    keep_random_state = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
    with torch.no_grad(), keep_random_state, disable_gradient_checkpointing(model):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


def plain_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Plain sampling or greedy decoding, as in training: top-p and penalties of the model's own files are ignored."""
    own_eos = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(own_eos if isinstance(own_eos, list) else [own_eos])} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature else 50,  # 0 is off; in greedy decoding, transformers warns about any value but 50
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=sorted(eos),
        pad_token_id=tokenizer.pad_token_id,
    )


def why_prompts_unshared(model: PreTrainedModel, config: GenerationConfig) -> str | None:
    """The reason why `generate` with this config needs transformers' own decoding loop; None if equal prompts can share
    a prefill, as in training."""
    reason = why_sampling_unsupported(config, base_of(model).generation_config)
    return reason or why_sharing_unsupported(model, is_sharded=has_sharded_parameters(model))


@contextmanager
def _sharing_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> Iterator[None]:
    """A context in which `model.generate` prefills equal prompts of a call once. If it cannot, a log line gives the
    reason."""
    reason = why_prompts_unshared(model, config)
    if reason is not None:
        logger.warning_once(f"Prompts are not shared in evaluation, so transformers' own loop is used: {reason}.")
        yield
        return
    lm = base_of(model)
    with shared_sampling(lm, GroupSampler(config.temperature), stop_strings_of(lm.generation_config), tokenizer):
        yield


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    description: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[GeneratedText]:
    """One completion per prompt, in order; several processes share the work.

    A completion ends with an end-of-sequence token of the model or the tokenizer, or with a stop string of the model's
    generation config. Equal prompts of a batch are prefilled once, so to sample several completions of a prompt, repeat
    it in a row.

    Args:
        temperature: sampling temperature; 0 for greedy decoding.
        batch_size: completions decoded at the same time on each process.
        seed: seed of the sampling; the caller's random state is restored.
        description: label of the progress bar; None for no bar.
        template_kwargs: additional arguments of the chat template.

    Returns:
        Strings for plain prompts, `[{"role": "assistant", "content": ...}]` for chat prompts, as TRL passes them to
        rewards.
    """
    state = PartialState()
    config = plain_generation_config(model, tokenizer, max_new_tokens, temperature)
    # Every process gets the same number: with sharded parameters, all processes must run every batch together.
    even = [*prompts, *list(prompts[-1:]) * (-len(prompts) % state.num_processes)]
    with (
        state.split_between_processes(even) as mine,
        evaluation_mode(model, seed + state.process_index),
        _sharing_prompts(model, tokenizer, config),
    ):
        ids = [tokenize_prompt(tokenizer, prompt, **(template_kwargs or {})) for prompt in mine]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # less padding; repeats stay adjacent
        texts = [""] * len(ids)
        silent = description is None or not state.is_main_process
        for start in bar(range(0, len(ids), batch_size), description, disable=silent):
            rows = order[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
            for i, answer in zip(rows, answers, strict=True):
                texts[i] = answer
    everyone = gather_object(texts) if state.num_processes > 1 else texts
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, everyone, strict=False)  # `everyone` may end with repeated prompts
    ]


def grade(reward: Reward, problems: Sequence[Problem], completions: Sequence[GeneratedText]) -> list[bool]:
    """Whether each completion earns 1.0 or more; one that the reward cannot score (None) counts as wrong."""
    columns = {name: [problem[name] for problem in problems] for name in problems[0] if name != "prompt"}
    prompts = [problem["prompt"] for problem in problems]
    scores = reward(prompts=prompts, completions=list(completions), **columns)
    return [score is not None and score >= 1.0 for score in scores]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    reward: Reward,
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    description: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    lenient_reward: Reward | None = None,
) -> Evaluation:
    """Greedy pass@1; with `samples` >= 1 also sampled pass@1, with `samples` >= 2 also pass@k for k up to `samples`.

    Args:
        problems: rows with `prompt` and the columns that `reward` reads; at least one.
        reward: reward function with TRL's signature; 1.0 or more means right.
        max_new_tokens: maximum tokens per completion.
        temperature: temperature of the samples, above 0.
        samples: number of samples per problem.
        batch_size, seed, description, template_kwargs: see `complete`.
        lenient_reward: grades the completions that `reward` finds wrong once more, with their format ignored
            (`grpo_ext.rewards.lenient`); None for no lenient accuracy.
    """
    prompts = [problem["prompt"] for problem in problems]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    settings |= {"description": description, "template_kwargs": template_kwargs}
    completions = complete(model, tokenizer, prompts, **settings)
    right = grade(reward, problems, completions)
    repeated = [problem for problem in problems for _ in range(samples)]
    sampled_right: list[bool] = []
    if samples:
        drawn = complete(model, tokenizer, [p["prompt"] for p in repeated], temperature=temperature, **settings)
        sampled_right = grade(reward, repeated, drawn)
    found = build_evaluation(problems, completions, right, sampled_right)
    if lenient_reward is None:
        return found
    right = _grade_wrong_ones(lenient_reward, problems, completions, right)
    sampled_right = _grade_wrong_ones(lenient_reward, repeated, drawn, sampled_right) if samples else []
    lenient = build_evaluation(problems, completions, right, sampled_right)
    return replace(found, right_lenient=right, lenient=lenient.greedy, lenient_sampled=lenient.sampled)


def _grade_wrong_ones(
    reward: Reward, problems: Sequence[Problem], completions: Sequence[GeneratedText], right: list[bool]
) -> list[bool]:
    """Whether each completion is right, with those that are not right graded once more."""
    wrong = [i for i, hit in enumerate(right) if not hit]
    again = grade(reward, [problems[i] for i in wrong], [completions[i] for i in wrong]) if wrong else []
    found = {i for i, hit in zip(wrong, again, strict=True) if hit}
    return [hit or i in found for i, hit in enumerate(right)]


def build_evaluation(
    problems: Sequence[Problem], completions: list[GeneratedText], right: list[bool], sampled_right: list[bool]
) -> Evaluation:
    """An evaluation from per-problem results.

    Args:
        completions, right: the greedy completion of each problem, and whether it is right.
        sampled_right: whether each sample is right. Samples of a problem are adjacent, and each problem has the same
            number of them; empty if there are none.
    """
    samples = len(sampled_right) // len(right)
    shares: list[float] = []
    pass_at: dict[int, Estimate] = {}
    if samples:
        hits = torch.tensor(sampled_right).view(-1, samples).sum(dim=1).tolist()
        shares = [hit / samples for hit in hits]
        pass_at = {k: Estimate.of([pass_at_k(hit, samples, k) for hit in hits]) for k in _reported_ks(samples)}
    return Evaluation(
        greedy=Estimate.of(right),
        sampled=Estimate.of(shares) if samples else None,
        pass_at_k=pass_at.get(samples),
        k=samples,
        completions=completions,
        right=right,
        shares=shares,
        pass_at=pass_at,
        kinds=accuracy_by_kind(problems, right),
        problems_digest=digest_of(problems),
    )


def accuracy_by_kind(problems: Sequence[Problem], right: Sequence[bool]) -> dict[str, dict[str, Estimate]]:
    """Share of right problems per value of each column in `KIND_COLUMNS`, values in natural order. Columns with one
    value or more than `MAX_KINDS` are skipped."""
    kinds = {}
    for column in KIND_COLUMNS:
        hits = defaultdict(list)
        for problem, hit in zip(problems, right, strict=True):
            if problem.get(column) is not None:
                hits[str(problem[column])].append(hit)
        if 2 <= len(hits) <= MAX_KINDS:
            kinds[column] = {value: Estimate.of(hits[value]) for value in sorted(hits, key=_natural_order)}
    return kinds


def _natural_order(value: str) -> list[str | int]:
    """Sort key that puts "Level 2" before "Level 10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", value)]


def _reported_ks(samples: int) -> list[int]:
    """Powers of two above 1 and below the number of samples, and that number; empty for fewer than two samples."""
    return [*(2**i for i in range(1, samples.bit_length()) if 2**i < samples), samples] if samples > 1 else []
