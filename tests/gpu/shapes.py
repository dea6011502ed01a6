"""Workloads and models of the kit. Lengths follow published runs, so that seconds can be compared with theirs.

T1     one prompt, 8 completions of 256 tokens, Qwen2.5-7B in NF4
U1     one prompt, 6 completions of 189 tokens, Qwen2.5-7B in NF4
GSM8K  8 prompts of about 150 tokens, 8 completions each of up to 256, Qwen2.5-0.5B
long   8 prompts of about 200 tokens, 8 completions each of up to 1,024, Qwen2.5-1.5B
"""

from dataclasses import dataclass
from typing import Any

from workloads import EOS, PAD, Workload, gsm8k, long_answers, tiny, uniform

PROMPT = 200  # tokens of the prompt of T1 and U1
TINY_FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Case:
    """A workload and the model that runs it; `seconds` is the time limit of one variant."""

    workload: Workload
    model: str
    load_in_4bit: bool
    seconds: float

    def spec(self, *, is_tiny: bool) -> dict[str, Any]:
        """The part of `grpo_side.measure`'s specification that all variants share, with `model` and `is_tiny` in place
        of `shape`: the program that starts the variants does not load transformers."""
        workload = tiny(self.workload) if is_tiny else self.workload
        return {
            "workload": workload.as_dict(),
            "warmup_workload": tiny(self.workload).as_dict(),
            "model": self.model,
            "is_tiny": is_tiny,
            "load_in_4bit": self.load_in_4bit,
            "bf16": True,
            "tf32": False,
            "warmup": 1,
            "steps": 1,
            "scale": False,
        }


CASES = {
    case.workload.name: case
    for case in (
        Case(uniform("T1", PROMPT, 256, 8), "Qwen/Qwen2.5-7B-Instruct", load_in_4bit=True, seconds=90),
        Case(gsm8k("GSM8K"), "Qwen/Qwen2.5-0.5B-Instruct", load_in_4bit=False, seconds=75),
        Case(uniform("U1", PROMPT, 189, 6), "Qwen/Qwen2.5-7B-Instruct", load_in_4bit=True, seconds=75),
        Case(long_answers("long"), "Qwen/Qwen2.5-1.5B-Instruct", load_in_4bit=False, seconds=150),
    )
}


def shape(model: str, *, is_tiny: bool) -> dict[str, Any]:
    """Fields of the model's config, with the special tokens of `models.word_tokenizer`."""
    from tests.memory.hub_configs import CONFIGS

    fields = CONFIGS[model].to_diff_dict() | {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    for name in ("transformers_version", "layer_types", "architectures"):
        fields.pop(name, None)
    return fields | (TINY_FIELDS if is_tiny else {})
