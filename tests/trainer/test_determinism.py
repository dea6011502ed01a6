"""`full_determinism=True` of transformers: every operation of a run has a deterministic version on the CPU."""

import os

import pytest
import torch

from tests.tools.metrics import comparable
from tests.tools.models import random_lora, small_llama
from tests.tools.reward_functions import half_dead
from tests.tools.training import adapter_of

VARIABLES = "CUDA_LAUNCH_BLOCKING CUBLAS_WORKSPACE_CONFIG ASCEND_LAUNCH_BLOCKING HCCL_DETERMINISTIC"
VARIABLES += " FLASH_ATTENTION_DETERMINISTIC"
SETTINGS = {
    "default": {},
    "chunks, exact KL": {"chunk_tokens": 40, "kl_estimator": "exact"},
    "replay, resampling": {"replay_fraction": 0.5, "dead_groups": "resample", "per_device_train_batch_size": 16},
}


@pytest.fixture
def restored():
    """transformers sets these for the whole process."""
    before = {name: os.environ.get(name) for name in VARIABLES.split()}
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.mark.parametrize("name", SETTINGS)
def test_two_runs_are_equal_to_the_byte(build, tokenizer, tmp_path, restored, name):
    """PyTorch raises in this mode if an operation has no deterministic version."""
    adapters = []
    for run in ("one", "two"):
        settings = SETTINGS[name] | {"reward": half_dead, "num_iterations": 2, "max_steps": 4, "full_determinism": True}
        trainer = build(small_llama(tokenizer), output_dir=str(tmp_path / run), peft_config=random_lora(), **settings)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.train()
        adapters.append(adapter_of(trainer))
    for parameter, value in adapters[0].items():
        assert torch.equal(value, adapters[1][parameter]), parameter
    assert comparable(tmp_path / "one" / "metrics.jsonl") == comparable(tmp_path / "two" / "metrics.jsonl")
