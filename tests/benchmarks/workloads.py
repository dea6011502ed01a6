"""Workloads of the benchmarks as exact lengths, and the shape of the model. No torch, so that parents stay small."""

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

VOCABULARY = 49152
PAD, EOS = 0, 1
FIRST_WORD = 2  # ids below are special

SMOLLM2_135M = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
TINY = SMOLLM2_135M | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
RAGGED_SEED = 53  # its 32 draws have mean 64.25 after the clip, minimum 6, maximum 256
GSM8K_SEED = 410  # prompts: mean 150.4, from 100 to 218; completions: mean 180.5, from 52 to 256, which 11 of 64 reach
LONG_SEED = 8  # prompts: mean 200.4, from 150 to 296; completions: mean 601.7, from 189 to 1024, which 7 of 64 reach
TINY_PROMPT, TINY_COMPLETION = 16, 8  # divisors of the lengths in a tiny run and in warm-up steps


@dataclass(frozen=True)
class Workload:
    """One optimizer step in tokens.

    Attributes:
        prompts: length of each prompt.
        completions: length of each completion with its EOS, prompt by prompt, as TRL orders rows.
    """

    name: str
    prompts: tuple[int, ...]
    completions: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.completions)

    @property
    def generations(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def longest_row(self) -> int:
        return max(self.prompts) + max(self.completions)

    @property
    def title(self) -> str:
        """Description for a table: `W1: 1 x S=512, G=8, C=64`."""
        spans = [
            "-".join(map(str, sorted({min(lengths), max(lengths)}))) for lengths in (self.prompts, self.completions)
        ]
        return f"{self.name}: {len(self.prompts)} x S={spans[0]}, G={self.generations}, C={spans[1]}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Workload":
        return cls(values["name"], tuple(values["prompts"]), tuple(values["completions"]))


def uniform(name: str, prompt: int, completion: int, generations: int) -> Workload:
    """One prompt, all completions of one length."""
    return Workload(name, (prompt,), (completion,) * generations)


def ragged(name: str) -> Workload:
    """Four prompts of 128-384 tokens; completion lengths are log-normal around a mean of 64, clipped to [1, 256]."""
    draw = random.Random(RAGGED_SEED)
    return Workload(name, (128, 213, 299, 384), _log_normal(draw, mean=64, sigma=1.0, number=4 * 8))


def gsm8k(name: str) -> Workload:
    """Eight prompts of about 150 tokens, with eight completions each of about 180, clipped to [1, 256]: the usual shape
    of GSM8K. Prompt lengths are triangular on [90, 230], completion lengths log-normal."""
    draw = random.Random(GSM8K_SEED)
    prompts = tuple(round(draw.triangular(90, 230, 130)) for _ in range(8))
    return Workload(name, prompts, _log_normal(draw, mean=190, sigma=0.4, number=8 * 8))


def long_answers(name: str) -> Workload:
    """Eight prompts of about 200 tokens, with eight completions each around 600 tokens, clipped to [1, 1024]."""
    draw = random.Random(LONG_SEED)
    prompts = tuple(round(draw.triangular(120, 300, 180)) for _ in range(8))
    return Workload(name, prompts, _log_normal(draw, mean=640, sigma=0.5, number=8 * 8, longest=1024))


def _log_normal(draw: random.Random, *, mean: float, sigma: float, number: int, longest: int = 256) -> tuple[int, ...]:
    """Lengths around `mean` before they are clipped to [1, longest]."""
    lengths = (draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) for _ in range(number))
    return tuple(min(longest, max(1, round(length))) for length in lengths)


def tiny(workload: Workload) -> Workload:
    """The same rows with a fraction of the tokens: for warm-up steps, and to try out the benchmark itself."""
    return replace(
        workload,
        prompts=tuple(max(2, length // TINY_PROMPT) for length in workload.prompts),
        completions=tuple(max(2, length // TINY_COMPLETION) for length in workload.completions),
    )


FULL = {
    workload.name: workload
    for workload in (
        uniform("W1", 512, 64, 8),
        uniform("W2", 64, 128, 8),
        uniform("W3", 2048, 64, 16),
        ragged("W4"),
        gsm8k("W5"),
    )
}
QUICK = {workload.name: workload for workload in (uniform("W1", 192, 32, 8), uniform("W2", 32, 32, 8))}
SCALE = {f"G={number}": uniform(f"G={number}", 512, 64, number) for number in (2, 4, 8, 16, 32, 64)}
PPO = {workload.name: workload for workload in (uniform("W1", 512, 64, 8), uniform("short", 64, 64, 8))}
