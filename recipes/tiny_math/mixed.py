"""Sums of mixed difficulty for the embedded model: of one- to four-digit numbers, of which it can learn one kind.

The model was pre-trained on sums of two three-digit numbers only. Measured on 48 problems of each kind, 8 samples per
problem at temperature 0.8:

    digits of both numbers        1       2       3       4
    share of right samples        0.00    0.00    0.39    0.00

A group on any other kind is therefore almost surely dead. A quarter of the problems is of each kind.
"""

import json
import random

from datasets import Dataset

from grpo_ext.recipes.tiny_math.build import HERE, PROMPT

DIGITS = (1, 2, 3, 4)
LEARNABLE = 3  # digits


def mixed_problems(count: int, seed: int) -> Dataset:
    """`count` different problems in random order, with columns `prompt`, `answer` and `digits`.

    Args:
        count: a multiple of 4, at most 220, because there are only 55 sums of one-digit numbers.
        seed: determines the problems. Those of three digits are taken from the training problems of GRPO, so that none
            of them is held out.
    """
    rng = random.Random(f"{seed} mixed")
    each = count // len(DIGITS)
    rows = []
    for digits in DIGITS:
        pairs = sorted(_learnable() if digits == LEARNABLE else _sums(rng, digits, each))
        rows += [(a, b, digits) for a, b in rng.sample(pairs, each)]
    rng.shuffle(rows)
    return Dataset.from_list(
        [{"prompt": PROMPT.format(question=f"{a}+{b}=?"), "answer": str(a + b), "digits": d} for a, b, d in rows]
    )


def _learnable() -> list[tuple[int, int]]:
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"].removesuffix("=?") for line in lines]
    return [(int(a), int(b)) for a, b in (question.split("+") for question in questions)]


def _sums(rng: random.Random, digits: int, count: int) -> set[tuple[int, int]]:
    """`count` different sums of two numbers of this length, the smaller number first."""
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    found: set[tuple[int, int]] = set()
    while len(found) < count:
        a, b = sorted((rng.randint(low, high), rng.randint(low, high)))
        found.add((a, b))
    return found
