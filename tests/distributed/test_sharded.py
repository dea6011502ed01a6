"""Two processes that shard parameters (FSDP2, ZeRO-3) or gradients and optimizer states (ZeRO-2) train the adapter of
one process, and complete a recipe run with guards, held-out accuracy, checkpoints and best adapter."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ext.data import load_problems
from grpo_ext.evaluation.complete import complete
from tests.distributed import two_sharded
from tests.tools.lanes import THOROUGH
from tests.tools.paths import ROOT, TINY_DATA, TINY_MODEL
from tests.tools.processes import in_two_processes

HELD_OUT = 9
with_deepspeed = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("deepspeed"),
        reason="needs: pip install wheel && DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
    ),
]
# FSDP2 needs a launch of its own, and takes TRL's path: with THOROUGH=1.
FSDP2 = pytest.param("fsdp2", marks=pytest.mark.skipif(not THOROUGH, reason="run with THOROUGH=1"))
CONFIGS = [FSDP2, *(pytest.param(name, marks=with_deepspeed) for name in ("deepspeed_zero2", "deepspeed_zero3"))]


@pytest.fixture(scope="module", params=CONFIGS)
def two(request, tmp_path_factory) -> Path:
    """The folder with the results of both processes, from one launch."""
    folder = tmp_path_factory.mktemp(request.param)
    config = ROOT / "accelerate_configs" / f"{request.param}.yaml"
    in_two_processes(two_sharded.__file__, folder, [f"--config_file {config}"])
    return folder


def shards(two: Path) -> bool:
    """Whether the parameters are sharded, not only gradients and optimizer states."""
    return "zero2" not in two.name


def test_shards_train_what_one_process_trains(two, tmp_path):
    """If parameters are sharded, prompts are not shared, and the log says why. The adapter is the same anyway; each
    process holds half of it, and it is saved whole."""
    first, second = (torch.load(two / f"given-{process}.pt") for process in (0, 1))
    assert first["shares"] is second["shares"] is not shards(two)
    is_logged = "TRL's plain path is taken: its parameters are sharded" in (two / "log").read_text()
    assert is_logged is shards(two)
    alone = two_sharded.train(1, tmp_path)
    assert alone["shares"]
    saved = load_file(two / "given" / "adapter_model.safetensors")
    assert len(saved) == len(alone["adapter"])
    for name, value in alone["adapter"].items():
        assert first["held_here"][name] == second["held_here"][name] == value.numel() // (2 if shards(two) else 1)
        torch.testing.assert_close(first["start"][name], alone["start"][name], atol=0, rtol=0)
        moved = (value - alone["start"][name]).abs().max()
        assert moved > 5e-4, f"{name} moved by only {moved:.1e}, so agreement to 5e-6 proves little"
        for adapter in (first["adapter"], second["adapter"]):
            torch.testing.assert_close(adapter[name], value, atol=5e-6, rtol=0, msg=name)
        assert torch.equal(saved[name.replace(".default", "")], first["adapter"][name])
    for name in ("loss", "grad_norm", "kl", "reward"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4), name


def test_what_needs_whole_parameters_is_refused(two):
    """A reference that follows the policy would be mixed from shards or from empty tensors."""
    refused = [two / f"refused-{process}" for process in (0, 1)]
    assert [path.exists() for path in refused] == [shards(two)] * 2
    for path in filter(Path.exists, refused):
        assert "Use sync_ref_model=False, or accelerate_configs/multi_gpu.yaml" in path.read_text()


def greedy(model) -> list[str]:
    """Greedy completions of the held-out problems, by a single process."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    heldout = load_problems(str(TINY_DATA), tokenizer, seed=42, max_heldout=HELD_OUT).heldout
    return complete(model, tokenizer, heldout["prompt"], max_new_tokens=48)


def test_a_whole_run_of_a_recipe(two):
    """Guards that find a shard instead of a tensor would end the run at its first update. An unequal number
    of batches per process (nine problems give two and one) would end an evaluation. Completions before training are
    those of the embedded model, and completions after training those of the saved adapter."""
    run = two / "whole"
    before = json.loads((run / "heldout_before.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert before["completions"] == greedy(lm)
    evaluations = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert all(len(row["right"]) == HELD_OUT for row in evaluations)
    after = greedy(PeftModel.from_pretrained(lm, run))
    assert [answer["text"] for answer in evaluations[-1]["answers"]] == after[:4]
    assert after != before["completions"]
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["pass@1"] == max(sum(row["right"]) for row in evaluations) / HELD_OUT
    kept, last = (load_file(folder / "adapter_model.safetensors") for folder in (run / "best", run))
    assert kept.keys() == last.keys()


def test_a_resumed_run(two):
    """Equal to the bit from the checkpoint of step 1 on. FSDP and DeepSpeed name the optimizer's files differently."""
    whole, again = (load_file(two / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    half = load_file(two / "whole" / "checkpoint-1" / "adapter_model.safetensors")
    assert not any(torch.equal(value, half[name]) for name, value in whole.items())
    completions = [(two / name / "completions.jsonl").read_text().splitlines() for name in ("whole", "again")]
    assert completions[1] == [line for line in completions[0] if json.loads(line)["step"] > 1]
