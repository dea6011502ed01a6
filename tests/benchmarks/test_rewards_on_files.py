"""The script that scores one's own file, on a tiny file."""

import json

import pytest

from tests.benchmarks import rewards_on_files

ROWS = [
    {"kind": "numbers", "gold": "42", "completion": r"so \boxed{42}", "expected": 1.0},
    {"kind": "numbers", "gold": "42", "completion": "#### 41", "expected": 1.0},
    {"kind": "roots", "gold": r"2\sqrt{3}", "completion": r"\boxed{\sqrt{12}}", "expected": 1.0},
    {"kind": "roots", "gold": r"2\sqrt{3}", "completion": r"\boxed{3.46}", "expected": 0.0},
]


def test_agreement_by_kind(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rewards_on_files.main([str(file), "--against_math_verify"])
    ours, theirs = capsys.readouterr().out.split("Math-Verify\n")
    for output in (ours, theirs):
        assert "numbers: 1 of 2 as expected (50.0%)" in output
        assert "roots: 2 of 2 as expected (100.0%)" in output
        assert "wrong: " in output
        assert "ms per completion, 3 completions" in output
    assert "row 1: expected 1.0, got 0.0; gold '42'" in ours


def test_a_row_without_a_column_is_named(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"gold": "1", "completion": "1"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"row 0 \(counted from 0\) has no expected"):
        rewards_on_files.main([str(file)])
