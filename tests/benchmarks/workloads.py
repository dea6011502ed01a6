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
TINY_PROMPT, TINY_COMPLETION = 16, 8  # divisors of the lengths in a tiny run


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
    draw, sigma = random.Random(RAGGED_SEED), 1.0
    lengths = (draw.lognormvariate(math.log(64) - sigma**2 / 2, sigma) for _ in range(4 * 8))
    return Workload(name, (128, 213, 299, 384), tuple(min(256, max(1, round(length))) for length in lengths))


def tiny(workload: Workload) -> Workload:
    """The same proportions at a size that takes seconds, to try out the benchmark itself."""
    return replace(
        workload,
        prompts=tuple(max(1, length // TINY_PROMPT) for length in workload.prompts),
        completions=tuple(max(1, length // TINY_COMPLETION) for length in workload.completions),
    )


FULL = {
    workload.name: workload
    for workload in (uniform("W1", 512, 64, 8), uniform("W2", 64, 128, 8), uniform("W3", 2048, 64, 16), ragged("W4"))
}
QUICK = {workload.name: workload for workload in (uniform("W1", 192, 32, 8), uniform("W2", 32, 32, 8))}
SCALE = {generations: uniform(f"G={generations}", 512, 64, generations) for generations in (2, 4, 8, 16, 32, 64)}
PPO = {workload.name: workload for workload in (uniform("W1", 512, 64, 8), uniform("short", 64, 64, 8))}
