"""Checks before a run: each one reports what was received and what is valid, and leaves no trace in the run."""

import functools
import logging
import random
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback
from trl.extras import profiling

from grpo_ext.model.unwrap import base_of
from grpo_ext.rewards import length_reward, math_answer_reward
from tests.checks.failing_rewards import fails_elsewhere, raises, too_few, words
from tests.tools.lanes import slow, slow_but, thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of

CHAT = "{% for m in messages %}{{ m['content'] }}#{% endfor %}"  # ends a turn with a token that ends no completion
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def fresh_lora(**changes):
    """An adapter that leaves the model unchanged until the first update."""
    return random_lora(**{"init_lora_weights": True} | changes)


def takes_answers(completions, answer, **columns):
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def takes_no_rest(completions, prompts):
    return [0.0] * len(completions)


@pytest.fixture
def without_weights(tmp_path, tokenizer, small_model):
    """A model folder without weights: whatever is refused for it is refused before weights are loaded."""
    folder = tmp_path / "model"
    small_model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# Before weights are loaded


REFUSED = [
    ({"reward": takes_answers}, r"Reward 'takes_answers' needs column 'answer'; the dataset has: prompt\."),
    (
        {"reward": takes_no_rest},
        r"accepts only \(completions, prompts\), .*takes_no_rest\(completions, prompts, \*\*",
    ),
    ({"prompts": []}, "The training data has no rows"),
    (
        {"prompts": PROMPTS[:1]},
        r"has only 1 prompt, and one rollout needs 2 \(8 completions / num_generations=4\)\. Add prompts, or",
    ),
    (
        {"prompts": [*PROMPTS, "1+" * 30 + "1=", "2+" * 20 + "2="], "max_prompt_tokens": 30},
        r'2 of 6 prompts are longer than max_prompt_tokens=30 \(longest \d\d\)\. Pass overlong_prompts="drop" or',
    ),
    (
        {"prompts": PROMPTS, "max_prompt_tokens": 2, "overlong_prompts": "drop"},
        r"4 of 4 prompts are longer than max_prompt_tokens=2 \(longest \d+\)\. Raise the limit\.",
    ),
    (
        {"prompts": [*PROMPTS, "1+" * 60 + "1="]},
        r"longest prompt has \d+ tokens; with max_completion_length=12 .* 128 positions.*max_prompt_tokens=116",
    ),
    ({"fp16": True}, "fp16=True needs a GPU"),
    (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "peft_config": None},
        "in 4 or 8 bits cannot be trained itself. Give a peft_config",
    ),
    (
        {
            "reward": math_answer_reward,
            "columns": {"answer": ["4", "nobody could say what this is in the end", "5", "6"]},
        },
        r"1 of 4 gold answers cannot be parsed \(rows are counted from 0\): row 1: 'nobody",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_before_weights_are_loaded(build, without_weights, settings, message):
    with pytest.raises(ValueError, match=message):
        build(without_weights, **{"guards": True, "peft_config": fresh_lora()} | settings)


def test_tokens_that_the_model_does_not_have(build, small_model):
    """On a GPU, this is an assertion in a kernel, perhaps hours later, and the CUDA context is lost."""
    small_model.config.vocab_size = 20
    with pytest.raises(ValueError, match=r"The tokenizer has a token \d+ .*the model has only 20 tokens"):
        build(small_model, guards=True, peft_config=fresh_lora())


def test_two_gpus_in_one_process(build, small_model, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*accelerate launch --num_processes 2"):
        build(small_model, guards=True, peft_config=fresh_lora())


def test_long_prompts_are_left_out_and_counted(build, small_model, caplog):
    settings = {"prompts": [*PROMPTS, "1+" * 30 + "1="], "max_prompt_tokens": 30, "overlong_prompts": "drop"}
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), **settings)
    assert trainer.train_dataset["prompt"][:] == PROMPTS
    assert "1 of 5 prompts are longer than max_prompt_tokens=30 and were left out (longest" in caplog.text


UNWISE = [
    ({"gradient_accumulation_steps": 1}, r"the completions of 2 prompts, .*: gradient_accumulation_steps=4\."),
    ({"num_generations": 2, "gradient_accumulation_steps": 1}, "num_generations=2: a group .* 50% at 0.5, 68% at 0.8"),
    ({"learning_rate": 1e-6}, "learning_rate=1e-06 is typical of full fine-tuning"),
    (
        {"peft_config": fresh_lora(lora_dropout=0.1), "disable_dropout": False},
        "lora_dropout=0.1 is on in sampling and in scoring",
    ),
    (
        {"reward": math_answer_reward, "columns": {"answer": ["4", "f(2) < f(1) < f(4)", "5", "6"]}},
        r"1 of 4 gold answers cannot be parsed and are compared as text.* row 1: 'f\(2\) < f\(1\)",
    ),
    *(
        (
            {"bf16": True, "max_completion_length": 64} | off_policy,
            r"one ratio per completion.* max_completion_length=64 tokens.* \(num_iterations=1, .*loss_type='dapo'",
        )
        for off_policy in (
            {"num_iterations": 2},
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "prompts": [*PROMPTS, *PROMPTS]},
        )
    ),
]
# The same settings, harmless: one update per rollout, a loss with a ratio per token, short completions, float32.
WISE = [
    {},
    {"bf16": True, "max_completion_length": 64},
    {"bf16": True, "max_completion_length": 64, "num_iterations": 2, "loss_type": "dapo"},
    {"bf16": True, "max_completion_length": 32, "num_iterations": 2},
    {"max_completion_length": 64, "num_iterations": 2},
]


@pytest.mark.parametrize(("settings", "message"), [*UNWISE, *((settings, None) for settings in WISE)])
def test_unwise_settings_are_reported(build, small_model, caplog, settings, message):
    with caplog.at_level(logging.WARNING, logger="grpo_ext.checks.preflight"):
        wise = {"guards": True, "peft_config": fresh_lora(), "gradient_accumulation_steps": 2}
        build(small_model, **wise | settings)
    said = [record.getMessage() for record in caplog.records if record.name == "grpo_ext.checks.preflight"]
    assert [bool(re.search(message, line)) for line in said] == [True] if message else not said


# Before the first step


def test_nothing_to_train(build, small_model):
    """An adapter loaded from disk is frozen by default. The run looks healthy and learns nothing (TRL #6700)."""
    frozen = get_peft_model(small_model, fresh_lora())
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"No trainable parameters\. .*is_trainable=True"):
        build(frozen, guards=True, beta=0.0).train()


FAILING = [
    (raises, r"Reward 'raises' raised KeyError\('solution'\)\. It was tried on the first row of the data, with 4"),
    (too_few, r"Reward 'too_few' returned \[1\.0\] for 4 completions"),
    (words, r"Reward 'words' returned 'good' for a completion; valid: a number, or None"),
    (fails_elsewhere, r"Reward 'fails_elsewhere' raised ConnectionError\('no judge there'\)"),
]


FAILING_IN_A_WORKER = [
    (raises, r"Reward 'raises' raised .*KeyError\('solution'\)"),
    (words, r"Reward 'words' raised TypeError.*'good' is not a score"),
]


@pytest.mark.parametrize(
    ("reward", "message", "workers"),
    [*((*case, 0) for case in FAILING), *(slow((*case, None)) for case in FAILING_IN_A_WORKER)],
)
def test_rewards_that_can_be_tried_are_tried(build, small_model, reward, message, workers):
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), reward=reward, reward_workers=workers)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def recording(is_safe):
    calls = []

    def reward(completions, **columns):
        calls.append(columns | {"completions": completions, "drawn": random.random()})
        return [float(len(text)) for text in completions]

    reward.scores_independently = is_safe
    return reward, calls


@pytest.mark.parametrize("early", [False, True])
def test_a_reward_is_tried_as_trl_calls_it(build, small_model, tokenizer, early):
    """The reward receives a whole group of one prompt and the state of the run. A made-up state would break a reward
    that divides by `max_steps`, or that reads a schedule set by `on_train_begin`."""
    reward, calls = recording(is_safe=True)
    begun = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(len(calls))

    trainer = build(
        small_model,
        guards=True,
        peft_config=fresh_lora(),
        reward=reward,
        reward_workers=0,
        columns={"answer": ["a", "b", "c", "d"]},
        max_steps=-1,
        num_train_epochs=3,
        arguments={"callbacks": [Begin()]},
    )
    if early:
        trainer.preflight()
        assert len(calls) == 1
    trainer.train()
    tried, *real = calls
    assert begun == [1 if early else 0]
    assert len(real) == trainer.state.global_step
    assert set(tried) == set(real[0])
    assert tried["prompts"] == [PROMPTS[0]] * 4
    assert tried["answer"] == ["a"] * 4
    assert tokenizer.batch_decode(tried["completion_ids"]) == tried["completions"]
    assert tried["trainer_state"].max_steps == trainer.state.max_steps > 0
    assert tried["trainer_state"].global_step == 0


def test_other_rewards_are_not_tried(build, small_model):
    """A reward that keeps its best score or writes samples to a file would begin with a made-up completion."""
    reward, calls = recording(is_safe=False)
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), reward=reward, reward_workers=None)
    trainer.preflight()
    assert calls == []
    trainer.train()
    assert [call["trainer_state"].max_steps for call in calls] == [2, 2]


def test_trying_a_reward_draws_no_random_numbers(build, small_model):
    drawn = []
    for is_safe in (True, False):
        reward, calls = recording(is_safe)
        trainer = build(small_model, guards=True, peft_config=fresh_lora(), reward=reward, reward_workers=0)
        random.seed(7)
        trainer.preflight()
        drawn.append(random.random())
        assert len(calls) == is_safe
    assert drawn[0] == drawn[1]


def test_the_parameters_of_a_decorator_count(build, small_model):
    """Those of the decorated function do not, since TRL never calls it."""

    def narrow(completions, answers_of_the_script):
        return [1.0] * len(completions)

    @functools.wraps(narrow)
    def adapted(**columns):
        return narrow(columns["completions"], [])

    trainer = build(small_model, guards=True, peft_config=fresh_lora(), reward=adapted, max_steps=1)
    assert trainer.train().global_step == 1


def likes_everything(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize("prompts", [MESSAGES, PROMPTS])
def test_templates(build, tokenizer, caplog, prompts, monkeypatch):
    """If a turn ends in a token that does not end a completion, every completion would run to its limit."""
    settings = {"guards": True, "peft_config": fresh_lora(), "reward": likes_everything, "max_steps": 1}
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    build(small_llama(tokenizer), prompts=prompts, **settings).preflight()
    ends = "The chat template ends a turn with '#', which contains no token that ends a completion"
    assert (ends in caplog.text) is (prompts is MESSAGES)
    assert "The prompts are plain text" not in caplog.text  # right for a base model that ships a template
    caplog.clear()
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("#", tokenizer.eos_token))
    build(small_llama(tokenizer), prompts=MESSAGES, **settings).preflight()
    assert "chat template" not in caplog.text


# The worst-case step


REHEARSED = [
    {},
    {"loss_type": "dapo", "steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_iterations": 2},
    {"kl_estimator": "exact", "chunk_tokens": 24},
    {"temperature_schedule": "entropy", "temperature_entropy_target": 4.0},
    {"temperature_schedule": "linear", "temperature_end": 1.2, "per_device_train_batch_size": 4}
    | {"gradient_accumulation_steps": 2},
    {"replay_fraction": 0.5, "num_generations_max": 8, "dead_groups": "resample"},
    {"share_prompt": False, "sync_ref_model": True, "ref_model_sync_steps": 1},
]


@pytest.mark.parametrize(
    "settings", slow_but(REHEARSED, REHEARSED[:2]), ids=lambda settings: "-".join(settings) or "default"
)
def test_the_worst_case_step_leaves_no_trace(build, tokenizer, settings):
    """The adapter, completions and metrics of a run are bit-identical with and without it."""
    runs = []
    for guards in (True, False):
        trainer = build(small_llama(tokenizer), guards=guards, peft_config=fresh_lora(), max_steps=3, **settings)
        trainer.train()
        history = [
            {
                name: value
                for name, value in row.items()
                if not any(part in name for part in ("time", "per_second", "memory"))
            }
            for row in trainer.state.log_history
        ]
        runs.append((adapter_of(trainer), list(trainer._logs["completion"]), history))
    (adapter, answers, history), (plain_adapter, plain_answers, plain_history) = runs
    assert answers == plain_answers
    assert history == plain_history
    assert all(torch.equal(adapter[name], value) for name, value in plain_adapter.items())


def test_no_tracker_receives_the_worst_case_step(build, small_model, monkeypatch):
    """TRL sends its timings to Trackio whether or not a run has begun there. Before one has, Trackio raises."""
    heard = []
    monkeypatch.setattr(profiling, "is_trackio_available", lambda: True)
    monkeypatch.setattr(
        profiling, "trackio", SimpleNamespace(log=lambda *row, **step: heard.append(row)), raising=False
    )
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), max_steps=1)
    trainer.args.report_to = ["trackio"]
    trainer.preflight()
    assert heard == []
    trainer.train()
    assert heard


def test_the_worst_case_step_has_the_largest_shape(build, small_model, tokenizer):
    """Every row has the longest prompt and a full completion, or one token less. A whole rollout runs without a graph,
    a micro-batch with one. No completion is masked as truncated, which would leave the update empty."""
    shapes = []
    longest = "Question: 123456+654321=?\nAnswer:"
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_completion_length": 17}
    settings |= {"mask_truncated_completions": True}
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), prompts=[*PROMPTS, longest], **settings)
    score = trainer._get_per_token_logps_and_entropies

    def seen(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        padding = [(~row.bool()).sum().item() for row in attention_mask]
        shapes.append((*input_ids.shape, padding, logits_to_keep, torch.is_grad_enabled()))
        return score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = seen
    trainer.preflight()
    tokens = len(tokenizer(longest)["input_ids"]) + 17
    # The reference pass, then the update
    assert shapes == [(12, tokens, [0, 1] * 6, 17, False), (4, tokens, [0, 1] * 2, 17, True)]
    assert all(parameter.grad is None for parameter in small_model.parameters())


def largest_forwards(trainer, act):
    """The maximum over all forwards of `act()`, with and without a graph: rows, input tokens, tokens of a prefilled
    prompt, and tokens in the cache."""
    largest = {}

    def seen(module, args, kwargs):
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        held = 0 if cache is None else cache.get_seq_length()
        sizes = {"rows": len(ids), "tokens": ids.numel(), "cached": len(ids) * (held + ids.size(1))}
        sizes["prefilled"] = 0 if held else ids.numel()
        for name, size in sizes.items():
            key = name, torch.is_grad_enabled()
            largest[key] = max(largest.get(key, 0), size)

    hook = base_of(trainer.model).model.register_forward_pre_hook(seen, with_kwargs=True)
    act()
    hook.remove()
    return largest


LARGEST = [
    {},
    {"chunk_tokens": 40},
    {"gradient_checkpointing": True},
    {"num_generations_max": 12},
    {"replay_fraction": 0.5},
    {"replay_fraction": 0.5, "num_generations_max": 8, "dead_groups": "resample", "num_iterations": 2},
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    {"dead_groups": "skip", "beta": 0.0, "entropy_coef": 0.0, "mask_truncated_completions": True},
]


@pytest.mark.parametrize(
    "settings",
    slow_but(thinned(LARGEST, LARGEST[3:5]), LARGEST[:1]),
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_no_step_of_the_run_is_larger(build, small_model, settings):
    """The engine computes equal prompts once. With the same longest prompt in every row, the worst-case step would be
    the smallest of all, and the run itself would be out of memory."""
    prompts = [f"Question: {i}+{i}=?\nAnswer:" for i in range(1, 10)]
    settings = {"per_device_train_batch_size": 16, "generation_kwargs": {"min_new_tokens": 9}} | settings
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), prompts=prompts, max_steps=6, **settings)
    rehearsed = largest_forwards(trainer, trainer.preflight)
    real = largest_forwards(trainer, trainer.train)
    assert trainer.state.global_step == 6
    assert real.keys() <= rehearsed.keys()
    # Half of the rows end one token earlier, so that the cache is copied when it is nearly full.
    rehearsed["cached", False] += rehearsed["rows", False]
    assert {key: size for key, size in real.items() if size > rehearsed[key]} == {}


def test_a_run_that_does_not_fit_is_told_what_would(build, small_model):
    trainer = build(small_model, guards=True, peft_config=fresh_lora())

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.compute_loss = full
    with pytest.raises(RuntimeError, match=r"does not fit into memory: 8 rows in the sampler and 8 .*grpo-ext plan"):
        trainer.train()


def test_a_dry_run_ends_before_the_first_step(build, small_model, capsys):
    """It takes no step and shows what the model sees, including special tokens."""
    trainer = build(
        small_model, guards=True, peft_config=fresh_lora(), reward=length_reward, dry_run=True, disable_tqdm=False
    )
    before = adapter_of(trainer)
    assert trainer.train().global_step == 0
    assert all(torch.equal(before[name], value) for name, value in adapter_of(trainer).items())
    said = re.sub(r"\s*│\n│\s*", "", capsys.readouterr().out)
    assert "length_reward: 0.18 (for a completion without an answer)" in said
    assert "Question: 1+2=?" in said
    assert re.search(r"worst-case step\s+\d+\.\d s, peak memory \d+\.\d\d GB resident", said)


def test_the_log_says_if_no_worst_case_step_is_possible(build, small_model, caplog):
    data = Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()
    trainer = build(small_model, guards=True, peft_config=fresh_lora(), max_steps=1)
    trainer.train_dataset = data
    trainer.preflight()
    assert "No worst-case step is run before training: the data has no length" in caplog.text


def test_the_embedded_model_passes(build, tiny_model):
    assert TINY_MODEL.is_dir()
    build(tiny_model, guards=True, peft_config=fresh_lora(), max_steps=1).train()
