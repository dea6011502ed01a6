"""Sums of mixed difficulty for the embedded model: of one- to four-digit numbers, of which it can learn one kind.

The model was pre-trained on sums of two three-digit numbers only. Measured on 48 problems of each kind, 8 samples per
problem at temperature 0.8:

    digits of both numbers        1       2       3       4
    share of right samples        0.00    0.00    0.39    0.00

A group on any other kind is therefore almost surely dead.
"""

import json
import random

from datasets import Dataset

from grpo_ext.recipes.tiny_math.build import HERE, PROMPT

IMPOSSIBLE = (1, 2, 4)  # digits


def mixed_problems(count: int, seed: int, *, learnable: float = 0.25) -> Dataset:
    """`count` different problems in random order, with columns `prompt`, `answer` and `digits`.

    Args:
        count: up to 165; there are only 55 sums of one-digit numbers.
        seed: determines the problems.
        learnable: share of the problems that have three digits. They are training problems of `data/`, so that none of
            them is held out. The other problems are of one, two and four digits in equal parts.
    """
    rng = random.Random(f"{seed} mixed")
    sums = [(a, b, 3) for a, b in rng.sample(_learnable(), round(count * learnable))]
    left = count - len(sums)
    for i, digits in enumerate(IMPOSSIBLE):
        here = left * (i + 1) // len(IMPOSSIBLE) - left * i // len(IMPOSSIBLE)
        sums += [(a, b, digits) for a, b in _sums(rng, digits, here)]
    rng.shuffle(sums)
    return Dataset.from_list(
        [{"prompt": PROMPT.format(question=f"{a}+{b}=?"), "answer": str(a + b), "digits": d} for a, b, d in sums]
    )


def _learnable() -> list[tuple[int, int]]:
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"].removesuffix("=?") for line in lines]
    return [(int(a), int(b)) for a, b in (question.split("+") for question in questions)]


def _sums(rng: random.Random, digits: int, count: int) -> list[tuple[int, int]]:
    """`count` different sums of two numbers of this length, the smaller number first."""
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        a, b = sorted((rng.randint(low, high), rng.randint(low, high)))
        found[a, b] = None
    return list(found)
