"""The kit for an hour with a GPU, tried out on a CPU with tiny models: its programs, their time limits, its wheels."""

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile

import pytest
from rich.console import Console

from tests.gpu.pack import keep_one_cuda, missing_packages
from tests.gpu.parts import Part, exit_status, run_parts
from tests.tools.paths import ROOT
from tests.tools.processes import launch

CHECKS = {"scores", "sampling", "steps", "nf4", "job", "fp16", "little_memory", "syncs"}


def run_tiny(command, file):
    """Run a program of the kit, and read its lines."""
    environment = {"PYTHON": sys.executable, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    status, output = launch([*command, "--tiny", "--threads", "1", "--out", str(file)], **environment)
    assert status == 0, output
    return {line["part"]: line["result"] for line in read(file)}


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_all_checks_run(tmp_path):
    """A check that no longer runs would cost the hour in which a GPU is there."""
    results = run_tiny(["bash", "tests/gpu/check.sh"], tmp_path / "check.jsonl")
    assert results["machine"]["versions"]["torch"]
    assert set(results["machine"]["missing"]) <= {"triton"}
    numbers = results["all"]
    (planned,) = (numbers[name] for name in numbers.keys() - CHECKS)
    assert numbers.keys() > CHECKS
    assert planned["planned"] > 0
    assert planned["allocated"] > 0
    assert numbers["job"]["steps"] == 2
    assert numbers["nf4"]["adapter"] == "torch.float32"
    assert {name for name in CHECKS if "skipped" in numbers[name]} == {"fp16", "little_memory", "syncs"}


def test_a_variant_of_the_benchmark_runs(tmp_path):
    """grpo_ext on a 4-bit base, with everything off that the benchmark switches off: a mechanism that was renamed would
    still be on."""
    results = run_tiny([sys.executable, "tests/gpu/bench.py"], tmp_path / "bench.jsonl")
    assert results.keys() == {"machine", "T1 ours, all mechanisms off"}
    (step,) = results["T1 ours, all mechanisms off"]["seconds"]
    assert step["sample"] > 0
    assert step["update"] > 0


PROGRAM = """
import json, sys, time
spec = json.loads(sys.argv[2])
if spec["does"] == "hang": time.sleep(1000)
if spec["does"] == "fail": raise ValueError("it failed")
print(json.dumps({"did": spec["does"]}))
"""


def test_a_part_that_hangs_or_fails_does_not_end_the_others(tmp_path):
    """Each has its line, and a later call repeats only those without a result."""
    script, file = tmp_path / "program.py", tmp_path / "folder" / "results.jsonl"
    script.write_text(PROGRAM)
    options = argparse.Namespace(out=file, seconds=1000, skip_done=None, threads=1, tiny=True)
    limits = {"hang": 1, "fail": 500, "end": 500}
    parts = [Part(name, {"does": name}, limit) for name, limit in limits.items()]
    run_parts(script, parts, options)
    lines = {line["part"]: line for line in read(file)}
    assert lines["hang"]["timed_out"] == "more than 1 s"
    assert lines["fail"]["failed"][-1] == "ValueError: it failed"
    assert lines["end"]["result"] == {"did": "end"}

    options.skip_done, options.seconds = file, 0
    earlier, *again = run_parts(script, parts, options)
    assert earlier == lines["end"]  # a ratio to stock TRL needs the results of both sessions
    assert [line["part"] for line in again] == ["hang", "fail"]
    assert all("not_reached" in line for line in again)
    assert exit_status(again, accepted=["not_reached"]) == 0
    assert exit_status(again) == exit_status(lines.values(), accepted=["timed_out"]) == 1


def test_the_table_says_why_a_variant_has_no_result():
    """After nine minutes, most variants were not reached: a table that calls them failed would be no use."""
    from report import runs_table  # found by the programs of the kit

    names = {"not_reached": "later", "timed_out": "slow", "does_not_fit": "large", "failed": "wrong"}
    runs = [
        {"workload": "T1", "title": "T1", "side": "ours", "variant": variant, name: "the reason"}
        for name, variant in names.items()
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(runs_table(runs))
    printed = console.file.getvalue()
    for name, variant in names.items():
        assert re.search(rf"{variant}\W+{name.replace('_', ' ')}", printed)


def test_without_a_gpu_no_large_model_is_started(tmp_path):
    """On a CPU they would take hours."""
    file = tmp_path / "bench.jsonl"
    command = [sys.executable, "tests/gpu/bench.py", "--out", str(file)]
    status, output = launch(command, PYTHONPATH="", CUDA_VISIBLE_DEVICES="")
    assert status == 1
    assert "need a GPU" in output
    assert [line["part"] for line in read(file)] == ["machine"]


def test_the_wheels_are_all_that_torch_and_accelerate_do_not_bring():
    """A package that is missing there would end the hour in its first minute."""
    missing = missing_packages("3.12")
    assert {"transformers", "regex", "datasets", "pyarrow", "rich", "pytest"} <= set(missing)
    assert not {"torch", "numpy", "sympy", "huggingface-hub", "grpo-ext"} & set(missing)
    assert set(missing) - set(missing_packages("3.12", has=["PyArrow"])) == {"pyarrow"}


def test_a_wheel_with_one_version_of_cuda_can_be_installed(tmp_path):
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda128", "cuda130", "rocm72")]
    about = {
        "bitsandbytes-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n",
        "bitsandbytes-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files = {"bitsandbytes/__init__.py": "", **dict.fromkeys(libraries, "machine code"), **about}
    record = "".join(f"{name},{digest(text)},{len(text)}\n" for name, text in files.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, "bitsandbytes-1.0.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    with pytest.raises(ValueError, match=r"'999'\. Valid: 128, 130"):
        keep_one_cuda(wheel, "999")
    keep_one_cuda(wheel, "130")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), wheel]
    subprocess.run(install, check=True, cwd=ROOT)
    kept = sorted(path.name for path in (site / "bitsandbytes").glob("*.so"))
    assert kept == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]


def digest(text):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
