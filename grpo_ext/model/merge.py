"""Merge an adapter into its base, for tools that do not support adapters, and measure the rounding error.

    base (bfloat16 or float32) + adapter (float32)  ->  W + s B A in the base's precision  ->  saved and reloaded

The error is measured on the result: logits of the merged model, loaded from disk, are compared with those of the base
with its adapter. A quantised base is refused, because rounding to 4 or 8 bits would erase most of what the adapter has
learnt.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_ext.model.load import unreachable_message
from grpo_ext.model.unwrap import head_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Texts for comparing logits: prose, a problem, a program, and a conversation.
TEXTS = (
    "The river had risen in the night, and by the morning the lower fields were under water.",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does it take?\nAnswer: 3 hours and 25 minutes.",
    "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n",
    "- Could you say that again?\n- Yes: 17 + 25 = 42, and 42 is the answer.\n",
)


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Logits of a merged model compared with those of the base with its adapter.

    Attributes:
        difference: largest absolute difference between two logits.
        largest: largest absolute logit of the base with its adapter, as a scale for `difference`.
        agreement: share of positions with the same most likely token.
        positions: number of positions compared.
    """

    difference: float
    largest: float
    agreement: float
    positions: int

    @classmethod
    def compare(cls, before: list[Tensor], after: list[Tensor]) -> "LogitComparison":
        """Compare logits of the same texts, one tensor (tokens, vocabulary) per text."""
        pairs = list(zip(before, after, strict=True))
        same = torch.cat([a.argmax(dim=-1) == b.argmax(dim=-1) for a, b in pairs])
        return cls(
            difference=max((a - b).abs().max().item() for a, b in pairs),
            largest=max(a.abs().max().item() for a in before),
            agreement=same.float().mean().item(),
            positions=len(same),
        )

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (the largest logit is {self.largest:.3g}); "
            f"the most likely token is the same at {self.agreement:.1%} of {self.positions} positions"
        )


def merge_adapter(
    adapter: str, out: str | Path, *, base: str | None = None, dtype: str = "bfloat16"
) -> LogitComparison:
    """Save base and adapter as one model, with tokenizer and generation config, into a new or empty folder.

    Args:
        adapter: a folder, or a name on the Hub.
        base: a folder or a name; by default the base that the adapter names.
        dtype: precision of the base and of the saved model, "bfloat16" or "float32".

    Raises:
        ValueError: the base is quantised or unknown, the adapter has no weights to merge, or `out` is not empty; the
            message says what to type.
        SystemExit: the base is neither on disk nor reachable.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"'{out}' is not empty. Name a new folder for the merged model.")
    config = PeftConfig.from_pretrained(adapter)
    base = base or config.base_model_name_or_path
    if base is None:
        raise ValueError(f"'{adapter}' does not name its base model. Add --base NAME, a Hub name or a folder.")
    _refuse_quantised(base, config.revision)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype], revision=config.revision)
    adapted = PeftModel.from_pretrained(model, adapter)  # in float32
    if not hasattr(adapted, "merge_and_unload"):
        raise ValueError(f"'{adapter}' is a {config.peft_type.value} adapter, which has no weights to merge.")
    tokenizer = _tokenizer(adapter, base)
    before = compute_logits(adapted, tokenizer)
    untie_lm_head(adapted.get_base_model())
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return LogitComparison.compare(
        before, compute_logits(AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype]), tokenizer)
    )


def untie_lm_head(model: PreTrainedModel) -> None:
    """Give a tied LM head its own weight if an adapter changes the head or the embedding: merging into the shared
    weight would change both. (PEFT already does so for whole layers of `modules_to_save`.)"""
    head = head_of(model)
    if not any(isinstance(layer, BaseTunerLayer) for layer in (head, model.get_input_embeddings())):
        return
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    assert layer is not None
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


@torch.no_grad()
def compute_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Logits of `TEXTS` in float32, one tensor (tokens, vocabulary) per text."""
    model.eval()
    inputs = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    return [model(input_ids=ids).logits[0].float() for ids in inputs]


def _refuse_quantised(base: str, revision: str | None) -> None:
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
    except OSError as error:
        raise SystemExit(unreachable_message("Model", base, error)) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"'{base}' is quantised, and rounding to so few bits would erase most of what the adapter adds. Add "
            f"--base NAME, the same model in bfloat16 or float32."
        )


def _tokenizer(adapter: str, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, or else that of the base."""
    try:
        return AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(base)
