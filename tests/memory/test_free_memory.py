"""The memory that a process can still take, in a container and shared between processes."""

import os

import pytest

import grpo_ext.recipes.math as recipe
from grpo_ext.machine import free_memory_per_process


@pytest.mark.parametrize(("limit", "expected"), [("1000", 1000 - 700 + 200), ("max", None)], ids=["limit", "no limit"])
def test_free_memory_in_a_container(tmp_path, limit, expected):
    files = {"memory.max": limit, "memory.current": "700", "memory.stat": "anon 400\ninactive_file 200"}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    free = free_memory_per_process(tmp_path)
    assert free == expected if expected else free > 10**6


def test_processes_of_a_run_share_it(tmp_path, monkeypatch):
    alone = free_memory_per_process(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory_per_process(tmp_path) == pytest.approx(alone / 4, rel=0.1)


@pytest.mark.parametrize(
    ("own", "flags", "expected"),
    [
        ({}, [], "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, [], "backend:cudaMallocAsync"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, [], None),
        ({}, ["--use_vllm", "true", "--vllm_enable_sleep_mode", "true"], None),
    ],
    ids=["default", "configured", "configured by the older name", "vLLM's own allocator"],
)
def test_recipes_let_the_allocator_grow_its_segments(monkeypatch, own, flags, expected):
    """Blocks of fixed sizes fragment the memory of a card. Settings of the user are kept."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    recipe.parse(flags)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
