"""Write a merged model as one GGUF file, the format of llama.cpp, and compare what transformers reads back.

    folder with config, weights and tokenizer  ->  FILE.gguf with metadata, vocabulary and tensors, unquantised

Names of metadata and tensors are those of the package `gguf` (`pip install "grpo-ext[gguf]"`). Covered are Llama, Qwen2
and Qwen3 without RoPE scaling, with byte-level BPE tokenizers that split texts in one of four ways. Anything else is
refused by name: llama.cpp's own converter knows many more models.

Linear weights have the layout of transformers, norms and biases are in float32, and a tied LM head is left out. For
Llama, llama.cpp rotates adjacent channels of a head instead of its two halves, so the rows of q and k are reordered.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_ext.model.merge import DTYPES, LogitComparison, compute_logits

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # model types of transformers, and names of llama.cpp
QWEN3_HEAD_DIM = 128  # of every dense Qwen3; transformers reads no other one from a GGUF file

# How a tokenizer splits a text before BPE, by llama.cpp's name (`tokenizer.ggml.pre`): pre-tokenizers of the package
# `tokenizers` with the settings that affect ids, and whether words of the vocabulary skip the merges.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, tuple[list[tuple[Any, ...]], bool]] = {
    "gpt-2": ([("ByteLevel", False, True)], False),
    "smollm": ([("Digits", True), ("ByteLevel", False, True)], False),
    "llama-bpe": ([("Split", LLAMA3_SPLIT, "Isolated", False), ("ByteLevel", False, False)], True),
    "qwen2": ([("Split", QWEN2_SPLIT, "Isolated", False), ("ByteLevel", False, False)], False),
}
SETTINGS = {
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Digits": ("individual_digits",),
    "Split": ("pattern", "behavior", "invert"),
}


def check_gguf_target(file: str | Path) -> None:
    """Raise before any work is done if `file` cannot be written.

    Raises:
        ValueError: the package `gguf` is missing, the name does not end in .gguf, or the file exists.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError('GGUF files need the package gguf. Type: pip install "grpo-ext[gguf]"') from None
    file = Path(file)
    if file.suffix != ".gguf":
        raise ValueError(f"'{file}' does not end in .gguf. Programs that read the file go by its name.")
    if file.exists():
        raise ValueError(f"'{file}' exists. Name a new file.")


def write_gguf(folder: str | Path, file: str | Path, *, dtype: str = "bfloat16") -> LogitComparison:
    """Write the model in `folder` to `file`, and compare its logits with those that transformers reads from there.

    Args:
        folder: a model with its tokenizer, as `merge_adapter` saves it.
        file: a new file, FILE.gguf.
        dtype: precision of the weights, "bfloat16" or "float32"; norms and biases are always in float32.

    Raises:
        ValueError: the file cannot be written, or model or tokenizer are not covered; the message says what to type.
    """
    check_gguf_target(file)
    file = Path(file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if reason := _not_covered(model.config) or _vocabulary_not_covered(tokenizer, model):
        raise ValueError(
            f"--gguf does not cover {reason}. The merged model is in {folder}. Convert it with llama.cpp: "
            f"python convert_hf_to_gguf.py {folder} --outfile {file}"
        )
    before = compute_logits(model, tokenizer)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(model, tokenizer, file)
        del model
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=DTYPES[dtype])
    except BaseException:
        file.unlink(missing_ok=True)  # half of a model
        raise
    return LogitComparison.compare(before, compute_logits(read, tokenizer))


def _not_covered(config: Any) -> str | None:
    """What llama.cpp or transformers would compute differently from this model, or nothing."""
    if config.model_type not in ARCHITECTURES:
        return f"the architecture {config.model_type!r}, only {', '.join(ARCHITECTURES)}"
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"RoPE scaling ({rope['rope_type']!r})"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "sliding-window attention"
    if (config.model_type != "qwen2" and config.attention_bias) or getattr(config, "mlp_bias", False):
        return f"biases in {config.model_type!r}"
    expected = QWEN3_HEAD_DIM if config.model_type == "qwen3" else config.hidden_size // config.num_attention_heads
    if (found := _head_dim(config)) != expected:
        return f"heads of {found} channels in this {config.model_type!r}, only {expected}"
    return None


def _vocabulary_not_covered(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """What llama.cpp would tokenize differently, or nothing."""
    parts = _parts_of(tokenizer)
    if parts["model"]["type"] != "BPE" or parts["model"].get("byte_fallback") or _split_of(parts) is None:
        return "this tokenizer, only byte-level BPE split as in GPT-2, SmolLM2, Llama 3 or Qwen2"
    if parts["normalizer"] is not None and parts["normalizer"]["type"] != "NFC":
        return f"the normalizer {parts['normalizer']['type']!r} of this tokenizer"
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in parts["added_tokens"]):
        return "added tokens that depend on the text around them"
    if _added_around(tokenizer) is None:
        return "special tokens other than one BOS in front and one EOS at the end of a text"
    if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:
        return "a tokenizer with more tokens than the model"
    if not isinstance(tokenizer.chat_template, str | None):
        return "several chat templates"
    return None


def _parts_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _split_of(parts: dict[str, Any]) -> str | None:
    """The key of `SPLITS` that describes this tokenizer."""
    outer = parts["pre_tokenizer"]
    steps = outer["pretokenizers"] if outer and outer["type"] == "Sequence" else [outer] if outer else []
    found = []
    for step in steps:
        values = [step.get(name) for name in SETTINGS.get(step["type"], ())]
        found.append((step["type"], *(value.get("Regex") if isinstance(value, dict) else value for value in values)))
    described = found, bool(parts["model"].get("ignore_merges"))
    return next((name for name, split in SPLITS.items() if split == described), None)


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | None:
    """Whether the tokenizer puts BOS in front of a text and EOS at its end; None if it adds anything else."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    cases = {(False, False): plain, (True, False): bos + plain, (False, True): plain + eos}
    return next((case for case, ids in (cases | {(True, True): bos + plain + eos}).items() if ids == whole), None)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Metadata first, then one tensor after the other: no second copy of the model is made."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(file.stem)
    is_16_bit = model.dtype == torch.bfloat16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_16_bit else gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, config)
    _add_vocabulary(writer, tokenizer, config.vocab_size)
    for name, tensor in _tensors(model):
        data_type = gguf.GGMLQuantizationType.BF16 if tensor.dtype == torch.bfloat16 else None
        array = _as_numpy(tensor)
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model):
        writer.write_tensor_data(_as_numpy(tensor))
    writer.close()


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens with their types, merges, special tokens and the chat template. A model often has more rows than its
    tokenizer has tokens; the others are marked as unused."""
    from gguf import TokenType

    parts = _parts_of(tokenizer)
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_split_of(parts))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = parts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    around = _added_around(tokenizer)
    assert around is not None
    writer.add_add_bos_token(around[0])
    writer.add_add_eos_token(around[1])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file with their names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    (architecture,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"{config.model_type} has a weight that llama.cpp does not know: {key}"
        if config.model_type == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if key.endswith("q_proj.weight") else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, tensor if tensor.dim() > 1 else tensor.float()


def _as_numpy(tensor: Tensor) -> Any:
    """The tensor as an array; bfloat16, which NumPy lacks, as its bytes."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
