"""The memory planner: against measured peaks of real training steps, against hand-worked numbers, and its command."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, LlamaConfig, MixtralConfig, Qwen2Config

from grpo_ext import cli
from grpo_ext.memory.counter import Tally
from grpo_ext.memory.device_kernels import HeadPass, Kernels
from grpo_ext.memory.estimate_step import rehearse
from grpo_ext.memory.meta_model import bytes_by_kind, config_of, skeleton
from grpo_ext.memory.plan import RESERVE, UNIT, Plan, Planner, changed, plan
from grpo_ext.memory.step_shapes import Step, passes
from grpo_ext.model.load import PolicyConfig
from tests.memory import planned_memory
from tests.tools.memory import RETURN_FREED
from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8192}
MODELS = {
    "llama": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **TOKENS,
    ),
    "qwen2": Qwen2Config(
        vocab_size=151936,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **TOKENS,
    ),
}
NF4, BF16, FP32 = {"load_in_4bit": True}, {"dtype": "bfloat16"}, {}


def step(prompt: int, completion: int, generations: int, **changes: Any) -> Step:
    return Step(
        **{"prompt": prompt, "completion": completion, "generations": generations, "rows": generations} | changes
    )


WHOLE = {"gradient_checkpointing": False}
# Of chunks of several rows and of parts of a prompt, of whole micro-batches, of one row at a time.
CASES = {
    "llama, fp32, whole": ("llama", FP32, step(256, 16, 8, **WHOLE)),
    "llama, fp32, chunks of 2 rows": ("llama", FP32, step(384, 16, 4, chunk_tokens=2 * 400)),
    "llama, bf16, whole": ("llama", BF16, step(256, 16, 8, **WHOLE)),
    "llama, NF4, chunks of 4 rows": ("llama", NF4, step(256, 16, 8, chunk_tokens=4 * 272)),
    "qwen2, fp32, 2 micro-batches": ("qwen2", FP32, step(256, 16, 4, accumulation=2)),
    "qwen2, NF4, 2 prompts, whole": ("qwen2", NF4, step(128, 8, 4, rows=8, **WHOLE)),
    "qwen2, bf16, row by row": ("qwen2", BF16, step(256, 8, 4)),
    "qwen2, NF4, chunks of 128 tokens": ("qwen2", NF4, step(384, 8, 4, chunk_tokens=128)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with random weights, by name."""
    made = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        made[name] = str(tmp_path_factory.mktemp(name))
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


@pytest.mark.slow
def test_estimates_are_those_of_real_steps(folders):
    """Within 15% of the peak of two steps of the trainer itself, beside what the process held before: whatever is
    forgotten, counted twice or freed too early shows in one of these settings."""
    cases = [[folders[model], asdict(sizes), policy] for model, policy, sizes in CASES.values()]
    done = subprocess.run(
        [sys.executable, planned_memory.__file__, json.dumps(cases)],
        env=os.environ | RETURN_FREED | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    measurements = [int(line.split()[1]) for line in lines if line.startswith("measured ")]
    far = {}
    for (name, case), measured in zip(CASES.items(), measurements, strict=True):
        model, policy, sizes = case
        footprint = planned(folders[model], sizes, device_type="cpu", **policy).footprint
        error = footprint.total / measured - 1
        print(f"| {name} | {footprint.total / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB | {error:+.1%} |")
        if abs(error) > 0.15:
            far[name] = error, footprint
    assert not far


def planned(model: str, sizes: Step, *, device_type: str = "cuda", memory: float = 2**40, **policy: Any) -> Plan:
    """Without what would fit."""
    config = PolicyConfig(model_name_or_path=str(model), **policy)
    return plan(config, sizes, device_type=device_type, memory=memory, with_largest=False)


SMALL = step(24, 8, 4)


def config_folder(tmp_path_factory, layers: int) -> str:
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaConfig(**sizes, **heads, **TOKENS | {"max_position_embeddings": 1024}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """The config of a model of five layers; there are no weights."""
    return config_folder(tmp_path_factory, 5)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The same of two layers, of which a step is counted soonest."""
    return config_folder(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def planner(small_folder):
    """Of that model on a GPU; what it has counted, it knows."""
    return Planner(PolicyConfig(model_name_or_path=small_folder), "cuda")


IN_CHUNKS = step(48, 8, 4, chunk_tokens=16, accumulation=2)


@pytest.mark.parametrize(
    ("device_type", "sizes"),
    [("cpu", SMALL), ("cpu", IN_CHUNKS), ("cuda", IN_CHUNKS), ("cuda", step(24, 8, 4, **WHOLE))],
)
def test_further_layers_add_the_same(small_folder, device_type, sizes):
    """A step is rehearsed on a few layers: where a further one added something else, large models would be far off."""
    planner = Planner(PolicyConfig(model_name_or_path=small_folder), device_type)
    whole = skeleton(planner.config, planner.policy, planner.dtype)
    footprint = planner.footprint(sizes)
    assert footprint.phases.keys() == {"sampling", "reference", "update"}
    for passed in passes(sizes):
        counted = rehearse(whole, passed, planner.kernels)
        assert footprint.phases[passed.phase].total == pytest.approx(counted.total), passed.phase


def test_weights_are_counted_once_each(small_folder):
    """By hand, of five layers: 64 words, hidden states of 32, 2 heads of 16, 1 of which for keys and values, 64 in the
    middle."""
    linear = 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    others = 2 * 64 * 32 + 11 * 32  # head and embedding, norms
    lora = 5 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    frequencies = 8 * 4  # of the rotary embedding; it keeps them twice
    sizes = sizes_of(small_folder, lora_r=4)
    assert sizes == {"bfloat16": 2 * (linear + others), "float32": 2 * frequencies, "adapter": 4 * lora}
    blocks = linear // 64
    tables = 35 * (16 + 256 + 1) * 4  # of each of 35 matrices: values of NF4, those of its constants, and their mean
    nested = linear // 2 + blocks + tables + 35 * 4  # a byte a block, and a float for up to 256 of these
    four_bit = sizes_of(small_folder, lora_r=4, load_in_4bit=True)
    assert four_bit == {"nf4": nested, "bfloat16": 2 * others, "float32": 2 * frequencies, "adapter": 4 * lora}
    simple = sizes_of(small_folder, load_in_4bit=True, use_bnb_nested_quant=False)
    assert simple["nf4"] == linear // 2 + 4 * blocks + 35 * 16 * 4


def test_two_of_what_runs_in_turn_are_enough(planner):
    """Rows of an update in chunks, and forwards of the reference, hold no more where all of them are counted, but for
    their scores: 4 bytes a token. Counting one alone would miss what it leaves to the next."""
    counted = {passed.phase: passed for passed in passes(step(96, 8, 8, chunk_tokens=104, accumulation=4))}
    assert (counted["update"].each, counted["reference"].prompts) == (2, 2)
    for all_of_it in (replace(counted["update"], each=8), replace(counted["reference"], prompts=4)):
        two = rehearse(planner._short, counted[all_of_it.phase], planner.kernels)
        scores = 4 * all_of_it.rows * all_of_it.completion
        every = rehearse(planner._short, all_of_it, planner.kernels)
        assert two.total <= every.total <= two.total + 4 * scores


def sizes_of(folder: str, **policy: Any) -> dict[str, int]:
    config = PolicyConfig(model_name_or_path=folder, **policy)
    return bytes_by_kind(skeleton(config_of(config), config, torch.bfloat16))


def test_the_adapter_is_held_four_times(planner):
    """Itself, its gradients and two states of AdamW; with several micro-batches, the sum of earlier gradients, too."""
    once = planner.footprint(SMALL)
    assert once.trained == 4 * once.adapter > 0
    twice = planner.footprint(replace(SMALL, accumulation=2))
    assert twice.total_in("update") == once.total_in("update") + once.adapter


def test_states_are_counted_by_hand(planner):
    """Keys and values of the prompt once, whatever G; in sampling those of every answer beside them."""
    token = 5 * 2 * 16 * 2  # layers, keys and values, one head of 16, bfloat16
    phases = planner.footprint(step(512, 8, 4)).phases
    assert phases["update"].states == phases["reference"].states == 511 * token
    assert 512 + 4 * 7 <= phases["sampling"].states / token <= (512 + 4 * 7) * 9 / 8 + 64
    many = planner.footprint(step(512, 8, 64)).phases
    assert many["update"].states == phases["update"].states


def test_what_costs_memory_costs_it(planner, small_folder):
    """The direction of every option, on a GPU: chunks, row by row, no reference, bf16 for fp32."""
    sizes = step(256, 64, 8, **WHOLE)
    update = planner.footprint(sizes).phases["update"].total
    row_by_row = planner.footprint(step(256, 64, 8)).phases["update"].total
    assert row_by_row < update / 2
    assert planner.footprint(step(256, 64, 8, chunk_tokens=64)).phases["update"].total < row_by_row
    assert planner.footprint(step(256, 64, 32)).phases["update"].total == pytest.approx(row_by_row)
    assert "reference" not in planner.footprint(replace(sizes, beta=0.0)).phases
    whole = planned(small_folder, SMALL, dtype="float32").footprint
    assert whole.weights["float32"] > planner.footprint(sizes).weights["bfloat16"]


def test_a_tile_of_the_head_on_a_gpu():
    """Products of at most 4096 tokens by 32768 words in bfloat16, and the gradient of the hidden states in float32."""
    lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40000, hidden_size=32, num_hidden_layers=1, **TOKENS))
    kernels = Kernels("cuda", torch.bfloat16)
    passed = HeadPass(tokens=5000, with_entropies=True, backward=False)
    assert kernels.tile(lm, passed) == 4096 * 32768 * 2
    assert kernels.tile(lm, replace(passed, backward=True)) == 4096 * 32768 * 2 + 5000 * 32 * 4


def test_a_tally_counts_what_is_there():
    """Views and results in place cost nothing, what is freed is gone, what autograd keeps is not."""
    x = torch.empty(1000, device="meta", requires_grad=True)
    with Tally() as tally:
        y = x * 2
        z = y.view(10, 100).sin()  # keeps y
        del y
        assert tally.now == 2 * 4000
        z = z.mul_(3).sum()
        assert tally.peak == 2 * 4000 + 4
        del z
        assert tally.now == 0


@pytest.mark.parametrize("name", UNIT)
def test_the_largest_fits_and_the_next_does_not(two_layers, name):
    sizes = step(256, 128, 8, **WHOLE) if name != "chunk_tokens" else step(256, 128, 8, chunk_tokens=512)
    planner = Planner(PolicyConfig(model_name_or_path=two_layers), "cuda")
    room = planner.footprint(sizes).total + 2**20
    found = planner.largest(sizes, name, room)
    assert found >= getattr(sizes, name)
    assert planner.footprint(changed(sizes, name, found)).total <= room
    assert planner.footprint(changed(sizes, name, found + UNIT[name])).total > room
    assert planner.largest(sizes, name, planner.footprint(sizes).overhead) is None


def test_no_bound_where_none_is_needed(two_layers):
    planner = Planner(PolicyConfig(model_name_or_path=two_layers), "cuda")
    assert planner.largest(step(32, 16, 4), "chunk_tokens", 2**40) == 0


def test_changes_where_it_does_not_fit(two_layers):
    """The first that suffices is the last that is named; where none does, all are, with what would still be needed."""
    sizes = step(256, 128, 8, **WHOLE)
    needs = planned(two_layers, sizes).footprint.total
    in_chunks = planned(two_layers, replace(sizes, chunk_tokens=128)).footprint.total
    little = planned(two_layers, sizes, memory=(needs + in_chunks) / 2 / (1 - RESERVE))
    assert not little.fits
    ((change, total),) = little.changes
    assert change == "--chunk_tokens 128"
    assert total == in_chunks <= little.room
    none = planned(two_layers, replace(sizes, accumulation=4), memory=2**20)
    named = [change for change, _ in none.changes]
    assert named == [
        "--chunk_tokens 128",
        "--load_in_4bit",
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 1",
        "--num_generations 4",
        "--max_completion_length 64",
    ]
    assert all(total > none.room for _, total in none.changes)


def test_through_its_command_line(capsys, two_layers):
    """The table fits one screen and adds up; the JSON says the same; on a card without room to spare, what was asked
    for is the largest that fits, also where it is no round number."""
    needs = planned(two_layers, step(33, 17, 4)).footprint.total
    memory = (needs + 8) / (1 - RESERVE) / 2**30
    sizes = ["--prompt", "33", "--completion", "17", "--generations", "4"]
    command = ["plan", "--model", two_layers, "--gpu", f"{memory:.15f}GB", *sizes]
    cli.main(command)
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 24
    for words in (
        "weights, bfloat16",
        "adapter, gradients, AdamW",
        "fits",
        f"{memory:.3g} GB less 10% that is left free",
    ):
        assert words in said
    assert "no plan for a GPU was compared with a card yet" in said
    cli.main([*command, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert sum(answer["lines"].values()) == pytest.approx(answer["total"], abs=10)
    assert answer["total"] == round(needs) == max(answer["phases"].values()) <= answer["room"]
    assert set(answer["largest"]) == set(UNIT)
    assert (answer["largest"]["prompt"], answer["largest"]["completion"]) == (33, 17)
    cli.main(["plan", "--model", two_layers, "--cpu", "0.001", "--prompt", "16", "--completion", "72"])
    said = capsys.readouterr().out
    assert "It does not fit" in said
    assert "--load_in_4bit" in said
    assert "Take a smaller model" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nobody/nothing"], "Model 'nobody/nothing' is not a local path and could not be fetched"),
        (["--prompt", "0"], "prompt=0 must be at least 2"),
        (["--per_device_train_batch_size", "12"], "needs a rollout that is a multiple of 8, got 12"),
        (["--chunk_tokens", "0"], "chunk_tokens=0 must be at least 1, for example 4096"),
        (
            ["--prompt", "2000", "--completion", "100"],
            r"prompt=2000 and completion=100 are 2100 tokens, .* for 1024\. Use",
        ),
    ],
)
def test_mistakes_give_one_sentence(small_folder, flags, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["plan", "--model", small_folder, "--gpu", "8GB", *flags])


def test_a_size_that_is_none(small_folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model", small_folder, "--gpu", "big"])
    assert "'big' is not a size. Type for example 8GB." in capsys.readouterr().err


def test_a_whole_fine_tune_is_not_planned(small_folder):
    with pytest.raises(ValueError, match=r"got use_peft=False, load_in_8bit=False\. Use use_peft=True"):
        planned(small_folder, SMALL, use_peft=False)


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    """The config of a mixture of experts."""
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    MixtralConfig(**sizes, **heads, **TOKENS, num_local_experts=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("device", "policy", "message"),
    [
        (
            "cuda",
            {},
            r"adapters on experts, which lora_target_modules=all-linear .* --lora_target_modules q_proj k_proj",
        ),
        ("cpu", {"lora_target_modules": ["q_proj", "v_proj"]}, r"got dtype=float32\. Use --dtype bfloat16"),
    ],
)
def test_experts_that_are_not_planned(experts_folder, device, policy, message):
    """Else both end in an error from inside of PyTorch; `all-linear`, the default, adapts experts."""
    with pytest.raises(ValueError, match=message):
        planned(experts_folder, SMALL, device_type=device, **policy)


def test_what_the_refusals_of_experts_name_is_planned(experts_folder):
    advised = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "dtype": "bfloat16"}
    weights = planned(experts_folder, SMALL, device_type="cpu", **advised).footprint.weights
    assert weights["bfloat16"] > 2 * 2 * 4 * 3 * 32 * 64  # layers, experts, matrices of 32 by 64


@pytest.mark.parametrize("kind", ["gemma3", "lfm2"])
def test_other_architectures(kind, tmp_path):
    """Layers of several kinds, which repeat; states that are not keys and values."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {
        "gemma3": (
            Gemma3TextConfig,
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 4},
        ),
        "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"] * 4}),
    }
    config, special = kinds[kind]
    config(**sizes, **heads, **TOKENS, **special).save_pretrained(tmp_path)
    made = planned(str(tmp_path), step(48, 8, 4, chunk_tokens=64))
    assert all(phase.total > phase.states > 0 for phase in made.footprint.phases.values())
