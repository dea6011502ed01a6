"""Scores the completions of a JSONL file with the math reward: agreement with the expected scores, and time.

    python tests/benchmarks/rewards_on_files.py answers.jsonl --against_math_verify

Each line has `gold`, `completion` and `expected` (1.0, 0.0, or null for a gold answer that cannot be judged), and may
have `prompt` and `kind`, by which lines are counted. `--against_math_verify` scores the same lines with Math-Verify
as well, in the same process. Times are CPU time, without those of the first line, which loads the parser.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_ext.rewards import math_answer_reward

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against_math_verify", action="store_true")
    parser.add_argument("--show", type=int, default=10, help="differing lines to print")
    options = parser.parse_args(argv)
    rows = read_rows(options.file)
    report("grpo-ext", rows, score, show=options.show)
    if options.against_math_verify:
        report("Math-Verify", rows, math_verify_scorer(), show=0)


def read_rows(file: Path) -> list[Row]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows):
        if missing := {"gold", "completion", "expected"} - set(row):
            raise SystemExit(f"{file}, row {number} (counted from 0) has no {', '.join(sorted(missing))}.")
    if not rows:
        raise SystemExit(f"{file} has no rows.")
    return rows


def score(row: Row) -> float | None:
    return math_answer_reward([row["completion"]], answer=[row["gold"]], prompts=[row.get("prompt", "")])[0]


def math_verify_scorer() -> Callable[[Row], float | None]:
    from math_verify import parse, verify

    def score_with_math_verify(row: Row) -> float | None:
        gold, answer = (parse(text, parsing_timeout=None) for text in (f"${row['gold']}$", row["completion"]))
        return float(verify(gold, answer, timeout_seconds=None))

    return score_with_math_verify


def report(name: str, rows: Sequence[Row], scorer: Callable[[Row], float | None], *, show: int) -> None:
    """Print the agreement by kind, the time per completion by expected score, and some lines that differ."""
    scorer(rows[0])
    agree, total, count, seconds = Counter[str](), Counter[str](), Counter[str](), defaultdict[str, float](float)
    differing = []
    for number, row in enumerate(rows):
        kind, expected = row.get("kind", "all"), row["expected"]
        started = time.process_time()
        received = scorer(row)
        label = "right" if expected == 1.0 else "wrong"
        seconds[label] += time.process_time() - started
        count[label] += 1
        total[kind] += 1
        agree[kind] += received == expected
        if received != expected:
            differing.append(f"row {number}: expected {expected}, got {received}; gold {str(row['gold'])[-60:]!r}")
    print(name)
    for kind in sorted(total):
        print(f"  {kind}: {agree[kind]} of {total[kind]} as expected ({agree[kind] / total[kind]:.1%})")
    for label in sorted(count):
        print(f"  {label}: {1e3 * seconds[label] / count[label]:.2f} ms per completion, {count[label]} completions")
    for line in differing[:show]:
        print(f"  {line}")


if __name__ == "__main__":
    main()
