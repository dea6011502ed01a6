"""The command line of the benchmark, with tiny models. Every run is a process of its own, so few variants are run."""

import json
import sys

import pytest

from tests.tools.paths import ROOT
from tests.tools.processes import launch

PHASES = ("sample", "reference", "update")


@pytest.fixture
def bench(tmp_path):
    """`bench("--only", "W4")`: the exit status, the output and the content of the JSON file of a tiny run."""

    def run(*options, **environment):
        file = tmp_path / "bench.json"
        script = ROOT / "tests" / "benchmarks" / "compare_trl.py"
        command = [sys.executable, str(script), "--tiny", "--threads", "1", "--out", str(file), *options]
        status, output = launch(command, **environment)
        return status, output, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    return run


def test_both_sides_are_measured_in_every_phase(bench):
    """On prompts and completions of different lengths, in the precision of a GPU run. A missing variant, a phase
    without a time, a step with other tokens, or one in another precision would make the comparison meaningless."""
    status, output, content = bench("--only", "W4", "--variants", "all rows/default", "--bf16", "--tf32")
    assert status == 0, output
    assert [(run["side"], run["variant"]) for run in content["runs"]] == [("stock", "all rows"), ("ours", "default")]
    for run in content["runs"]:
        spec, result = run["spec"], run["result"]
        (step,) = result["seconds"]
        assert all(step[phase] > 0 for phase in PHASES)
        assert step["step"] == pytest.approx(sum(step[phase] for phase in PHASES))
        assert all(result["peak_mib"][phase] > 0 for phase in PHASES)
        assert result["weights_mib"] > 0
        assert result["dtypes"] == {"weights": "torch.bfloat16", "adapter": "torch.float32"}
        assert result["float32_products"] == "high"
        warmup, total = result["logged"]["num_tokens"]
        assert warmup == tokens_of(spec["warmup_workload"])
        assert total - warmup == tokens_of(spec["workload"])
    stock, ours = content["runs"]
    assert stock["spec"]["workload"] == ours["spec"]["workload"]
    compared = {row["variant"]: row for row in content["ratios"]}
    for phase in PHASES:
        times = [run["result"]["seconds"][0][phase] for run in (stock, ours)]
        assert compared["default"][phase] == pytest.approx(times[0] / times[1])
        assert f"{times[1]:.2f} ({times[0] / times[1]:.2f}x)" in output


def tokens_of(workload):
    """Tokens of a step: each completion, with its prompt."""
    rows = len(workload["completions"]) // len(workload["prompts"])
    return rows * sum(workload["prompts"]) + sum(workload["completions"])


def test_a_run_by_group_size_measures_the_machine(bench):
    status, output, content = bench("--scale-g", "--only", "G=2", "--sides", "ours")
    assert status == 0, output
    (run,) = content["runs"]
    assert run["workload"] == "G=2"
    result = run["result"]
    assert result["dtypes"] == {"weights": "torch.float32", "adapter": "torch.float32"}
    share = result["update_flops"] / result["seconds"][0]["update"] / result["matmul_flops"]
    assert f"{result['update_flops'] / 1e9:.1f}" in output
    assert f"{share:.0%}" in output


def test_a_run_that_fails_is_reported(bench):
    """A script that compares the numbers must notice that one is missing. torch refuses this value when it is imported,
    which only the process of the run does."""
    status, output, content = bench("--only", "W4", "--variants", "default", TORCH_LOGS="no such log")
    assert status == 1
    assert "failed" in output
    (run,) = content["runs"]
    assert "result" not in run
    assert any("no such log" in line for line in run["failed"])


@pytest.mark.parametrize(
    "options",
    [
        ("--only", "W6"),
        ("--variants", "fastest"),
        ("--quick", "--only", "W5"),
        ("--sides", "ours", "--variants", "1 row"),
    ],
)
def test_options_that_leave_nothing_to_run_are_refused(bench, options):
    status, output, content = bench(*options)
    assert status != 0
    assert "unknown" in output or "nothing was run" in output
    assert content is None
