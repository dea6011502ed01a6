"""Checks of results on this device. Each returns the numbers that it compared, and raises if they are too far apart."""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grpo_side import measure
from shapes import shape
from transformers import AutoConfig
from workloads import tiny, uniform

import grpo_ext.recipes.math as math_recipe
from grpo_ext.engine.decode import GroupSampler
from grpo_ext.memory.plan import Planner
from grpo_ext.memory.step_shapes import StepShape
from grpo_ext.model.load import PolicyConfig
from tests.tools.architectures import TEMPERATURE, random_model
from tests.tools.scoring import gradients, padded_batch, prompts_of, score_by_trl, scoring_batch_of

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MIB = 2**20
QWEN_05B, QWEN_15B = (f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B"))
LOGP_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # nats per token
GRADIENT_BOUND = 1e-3  # of the norm, in float32
Numbers = dict[str, Any]


def scores(is_tiny: bool) -> Numbers:
    """Log-probs and gradients of shared scoring, whole and in chunks, against TRL's scoring."""
    numbers = {}
    for dtype, bound in LOGP_BOUNDS.items():
        model = random_model("qwen2", "sdpa", dtype).to(DEVICE)
        ids, mask, C = padded_batch()
        ids, mask = ids.to(DEVICE), mask.to(DEVICE)
        wanted = score_by_trl(model, ids, mask, C)
        wanted_gradients = gradients(model, wanted)
        for chunk_tokens in (None, 64):
            got = model(scoring_batch=scoring_batch_of(ids, mask, C, chunk_tokens=chunk_tokens))
            name = f"{dtype}, chunk_tokens={chunk_tokens}"
            numbers[name] = (got.logps_BC - wanted[0]).abs().max().item()
            _require(numbers[name] < bound, numbers)
            if dtype == torch.float32:
                found = gradients(model, (got.logps_BC, got.entropies_BC))
                errors = [(found[n] - g).norm() / g.norm() for n, g in wanted_gradients.items()]
                numbers[f"{name}, gradients"] = max(errors).item()
                _require(max(errors) < GRADIENT_BOUND, numbers)
    return numbers


def sampling(is_tiny: bool) -> Numbers:
    """Greedy and sampled tokens in float32, against those of transformers from the same random state."""
    model = random_model("qwen2", "sdpa", torch.float32).to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in prompts_of(20, 20, 14))
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "top_k": 0}
    numbers = {}
    for name, how in {"greedy": {"do_sample": False}, "sampled": {"temperature": TEMPERATURE}}.items():
        outputs = []
        for sampler in ({}, {"custom_generate": GroupSampler(temperature=TEMPERATURE)}):
            torch.manual_seed(0)
            outputs.append(model.generate(**{"do_sample": True} | settings | how | sampler))
        numbers[f"rows with the same tokens, {name}"] = _share_of_equal_rows(*outputs)
        _require(numbers[f"rows with the same tokens, {name}"] == 1, numbers)
    return numbers


def steps(is_tiny: bool) -> Numbers:
    """Two float32 steps of the same objective, ours against stock TRL: loss, KL, gradient norm and rewards."""
    logged = {}
    for side in ("stock", "ours"):
        logged[side] = measure(_spec(QWEN_05B, True, side=side, bf16=False))["logged"]
    numbers = {name: [logged[side][name] for side in logged] for name in ("loss", "kl", "grad_norm", "reward")}
    for name, (stock, ours) in numbers.items():
        _require(torch.allclose(torch.tensor(ours), torch.tensor(stock), rtol=5e-3, atol=5e-4), {name: numbers[name]})
    return numbers


def nf4(is_tiny: bool) -> Numbers:
    """A step on a 4-bit base of 1.5B in bfloat16: finite, with the adapter still in float32."""
    result = measure(_spec(QWEN_15B, is_tiny, load_in_4bit=True))
    return _finite(result) | {"weights_mib": result["weights_mib"], "peak_mib": result["peak_mib"]}


def fp16(is_tiny: bool) -> Numbers:
    """A step on a frozen base in float16, and in NF4, with a gradient scaler: what cards without bfloat16 run."""
    if not HAS_GPU:
        return {"skipped": "accelerate has no float16 on a CPU"}
    numbers = {}
    for name, load_in_4bit in (("float16", False), ("NF4", True)):
        spec = _spec(QWEN_05B, is_tiny, bf16=False, load_in_4bit=load_in_4bit, settings={"fp16": True})
        numbers[name] = _finite(measure(spec))
        _require(numbers[name]["weights"] == "torch.float16", numbers)
    return numbers


def little_memory(is_tiny: bool) -> Numbers:
    """A run whose update does not fit on one graph: it goes on in smaller chunks, or its error says what to change."""
    if not HAS_GPU:
        return {"skipped": "needs the limit of a GPU's allocator"}
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((1 if is_tiny else 6) * 2**30 / total)
    settings = {"gradient_checkpointing": False, "chunk_tokens": None}
    try:
        result = measure(_spec(QWEN_05B, is_tiny, settings=settings, long=True))
    except Exception as error:  # of several types
        _require("chunk_tokens" in str(error), {"error": str(error)})
        return {"advice": str(error)}
    numbers = {"chunk_limits": result["chunk_limits"], "peak_mib": result["peak_mib"]}
    _require(is_tiny or result["chunk_limits"]["with_graph"], numbers)  # else the update fitted, and nothing was tried
    return numbers


def syncs(is_tiny: bool) -> Numbers:
    """Host syncs while 64 tokens of 12 rows are sampled, as PyTorch warns of them."""
    if not HAS_GPU:
        return {"skipped": "counted on a simulated device, see tests/engine/test_second_device.py"}
    model = random_model("qwen2", "sdpa", torch.bfloat16).to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in prompts_of(20, 20, 14))
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=64,
            eos_token_id=None,
            do_sample=True,
            custom_generate=GroupSampler(temperature=TEMPERATURE),
        )
    torch.cuda.set_sync_debug_mode("default")
    return {"syncs": sum("synchroniz" in str(warning.message) for warning in caught)}


def job(is_tiny: bool) -> Numbers:
    """recipes/math.py on the embedded model, and the same run resumed for a few more steps."""
    with tempfile.TemporaryDirectory() as folder:
        steps, more = (1, 1) if is_tiny else (10, 2)
        flags = ["--config", "tiny_math.yaml", "--output_dir", folder, "--eval_samples", "0", "--eval_steps", "5"]
        flags += ["--max_eval_prompts", "16" if is_tiny else "256", "--save_steps", str(steps)]
        if is_tiny:
            flags += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "16"]
        with contextlib.redirect_stdout(io.StringIO()):
            math_recipe.main([*flags, "--max_steps", str(steps)])
            math_recipe.main([*flags, "--max_steps", str(steps + more), "--resume_from_checkpoint", "last"])
        summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    _require(summary["steps"] == steps + more, summary)
    return {name: summary[name] for name in ("device", "steps", "seconds", "peak_memory_mb")} | {
        name: summary[name]["value"] for name in ("pass_at_1_before", "pass_at_1_after")
    }


def plan(is_tiny: bool, *, model: str, load_in_4bit: bool, sizes: dict[str, Any]) -> Numbers:
    """Planned bytes against those allocated and reserved in a step, all in MiB. The plan's overhead, for what is not in
    tensors, is apart; `outside` is what the driver counts beyond PyTorch's allocator.

    Args:
        sizes: fields of StepShape.
    """
    if is_tiny:
        sizes = {key: size // 8 if type(size) is int else size for key, size in sizes.items()}
    step = StepShape(**sizes, generations=8, rows=8, accumulation=2, beta=0.1)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**shape(model, is_tiny=is_tiny)).save_pretrained(folder)
        policy = PolicyConfig(model_name_or_path=folder, load_in_4bit=load_in_4bit)
        footprint = Planner(policy, DEVICE.type).footprint(step)
    workload = uniform("plan", step.prompt, step.completion, step.generations)
    both = type(workload)("plan", workload.prompts * 2, workload.completions * 2)
    settings = {"gradient_checkpointing": step.gradient_checkpointing, "chunk_tokens": step.chunk_tokens}
    spec = _spec(model, is_tiny, load_in_4bit=load_in_4bit, bf16=HAS_GPU)
    spec |= {"workload": both.as_dict(), "warmup_workload": tiny(both).as_dict()}
    spec["settings"] = settings | {"per_device_train_batch_size": step.rows}
    result = measure(spec)
    numbers = {
        "planned": (footprint.total - footprint.overhead) / MIB,
        "allocated": result["weights_mib"] + max(result["peak_mib"].values()),
        "reserved": result["reserved_mib"],
        "planned_overhead": footprint.overhead / MIB,
    }
    if HAS_GPU:
        free, total = torch.cuda.mem_get_info()
        numbers["outside"] = (total - free - torch.cuda.memory_reserved()) / MIB
    return numbers | {"planned / allocated": numbers["planned"] / numbers["allocated"]}


CHECKS: dict[str, Callable[..., Numbers]] = {
    function.__name__: function for function in (scores, sampling, steps, nf4, job, fp16, little_memory, syncs)
}


def _spec(model: str, is_tiny: bool, *, side: str = "ours", long: bool = False, **changes: Any) -> dict[str, Any]:
    workload = uniform("check", 512 if long else 200, 512 if long else 64, 8)
    if is_tiny:
        workload = tiny(workload)
    return {
        "side": side,
        "workload": workload.as_dict(),
        "warmup_workload": workload.as_dict(),
        "shape": shape(model, is_tiny=is_tiny),
        "settings": {},
        "warmup": 1,
        "steps": 1,
        "scale": False,
        "bf16": True,
        "tf32": False,
    } | changes


def _share_of_equal_rows(one: torch.Tensor, other: torch.Tensor) -> float:
    width = max(one.size(1), other.size(1))
    padded = [torch.nn.functional.pad(ids, (0, width - ids.size(1))) for ids in (one, other)]
    return (padded[0] == padded[1]).all(dim=1).float().mean().item()


def _finite(result: dict[str, Any]) -> Numbers:
    numbers = {name: result["logged"][name] for name in ("loss", "kl", "grad_norm")}
    _require(all(torch.tensor(values).isfinite().all() for values in numbers.values()), numbers)
    _require(result["dtypes"]["adapter"] == "torch.float32", result["dtypes"])
    return numbers | result["dtypes"]


def _require(holds: Any, numbers: Numbers) -> None:
    if not holds:
        raise AssertionError(json.dumps(numbers))
