"""`chunk_tokens="auto"`: as many rows as memory allows, measured; the same training as with that number."""

import copy

import psutil
import pytest
import torch

from grpo_ext import GRPOExtConfig
from grpo_ext.checks.chunk_size import Shape, choose_chunk_size
from grpo_ext.memory.counter import MemoryCounter
from tests.tools.models import random_lora
from tests.tools.training import adapter_of

GB = 2**30


@pytest.fixture
def available(monkeypatch):
    """`available(bytes)`: this much memory is free."""

    def set_free(free):
        memory = psutil.virtual_memory()._replace(available=int(free))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return set_free


@pytest.mark.parametrize(
    ("budget", "prompts", "tokens"),
    [
        (800, 1, 9 * 40 + 8 * 10),  # 100 + 7 * 100
        (799, 1, 7 * 50),
        (250, 1, 2 * 50),
        (90, 1, 50),  # even one row does not fit: the update itself will be repeated in smaller chunks
        (1600, 2, 2 * (9 * 40 + 8 * 10)),
        (1599, 2, 9 * 40 + 8 * 10),  # one of two groups
        (8000, 2, 10 * (9 * 40 + 8 * 10)),  # more than this micro-batch needs: later ones may be larger
    ],
)
def test_as_many_rows_as_fit(budget, prompts, tokens):
    """A prompt with its first row needs 100 bytes, each further row 100."""
    shape = Shape(prompt=40, completion=10, rows_per_prompt=8, prompts=prompts)
    assert choose_chunk_size(shape, lambda rows: 100 * rows, free=2 * budget, usable=0.5).tokens == tokens


@pytest.fixture
def train(build, small_model, tmp_path):
    def run(name, resume=None, **settings):
        options = {"peft_config": random_lora(init_lora_weights=True), "max_steps": 3, "guards": True, "beta": 0.0}
        options |= {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / name)} | settings
        trainer = build(copy.deepcopy(small_model), **options)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer

    return run


def equal(trainer, other):
    pairs = zip(adapter_of(trainer).values(), adapter_of(other).values(), strict=True)
    return all(torch.equal(value, same) for value, same in pairs)


def test_what_fits_whole_trains_as_without_a_limit(train, available, capsys):
    available(64 * GB)
    auto = train("auto", chunk_tokens="auto", gradient_checkpointing=True, disable_tqdm=False)
    assert "8 completions at once" in capsys.readouterr().out
    assert equal(auto, train("whole", gradient_checkpointing=False))


def test_a_chosen_size_is_kept_and_resumed(train, available):
    """With so little memory that two rows fit, and again with plenty, in which a new run would choose otherwise."""
    peaks = {}
    for chunk_tokens in (1, 200):
        trainer = train(f"probe {chunk_tokens}", chunk_tokens=chunk_tokens, max_steps=1)
        with MemoryCounter() as counter:
            trainer.compute_loss(trainer.model, trainer._buffered_inputs[0]).backward()
        peaks[chunk_tokens] = counter.peak
    assert peaks[1] < peaks[200]
    available(2 * (peaks[1] + peaks[200]) / 2)
    auto = train("auto", chunk_tokens="auto")
    chosen = auto.parts.scorer.limits.state_dict()["with_graph"]
    assert chosen is not None
    assert equal(auto, train("number", chunk_tokens=chosen))
    available(64 * GB)
    resumed = train("auto", resume="auto/checkpoint-2", chunk_tokens="auto")
    assert resumed.parts.scorer.limits.state_dict()["with_graph"] == chosen
    assert equal(resumed, auto)


def test_without_a_worst_case_step_the_first_micro_batch_is_measured(train, available, tmp_path):
    """Two groups of four rows. With plenty of memory they run at once, with little memory in chunks, and either way the
    measurement leaves nothing behind."""
    settings = {"guards": False, "gradient_checkpointing": True}
    available(64 * GB)
    assert equal(train("auto", chunk_tokens="auto", **settings), train("whole", guards=False))
    available(1)
    scarce = train("scarce", chunk_tokens="auto", **settings)
    chosen = scarce.parts.scorer.limits.state_dict()["with_graph"]
    assert equal(scarce, train("number", chunk_tokens=chosen, **settings))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("scarce", "number")]
    assert metrics[0] == metrics[1]


def test_a_number_from_a_command_line_is_a_number(tmp_path):
    def configured(chunk_tokens):
        return GRPOExtConfig(str(tmp_path), chunk_tokens=chunk_tokens, use_cpu=True).chunk_tokens

    assert configured("64") == 64
    assert configured("auto") == "auto"
    assert configured("none") is None
    with pytest.raises(ValueError, match="chunk_tokens='some' must be at least 1, for example 4096, or 'auto'"):
        configured("some")
