"""`grpo-ext merge --gguf`: transformers reads the merged model back from the GGUF file, weights, tokenizer and all."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from grpo_ext import cli
from grpo_ext.model.gguf_file import LLAMA3_SPLIT, QWEN2_SPLIT, write_gguf
from grpo_ext.model.merge import TEXTS, compute_logits
from tests.tools.models import random_lora
from tests.tools.paths import ROOT, TINY_MODEL

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MORE_TEXTS = (
    "<|im_start|>user\nWhat's 1234567+25?<|im_end|>\n<think>42</think>",
    "  spaces\t\ttabs \r\n\n\n end ",
    "Ünïcödé 中文 🙂 ½ x² I'LL DON'T",
)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "llama": {"hidden_size": 32, **HEADS},
    "qwen2": {"hidden_size": 32, **HEADS},
    "qwen3": {"hidden_size": 32, **HEADS, "head_dim": 128},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


def bpe(split: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on our own pages; that of Llama 3 puts a BOS in front."""
    whole = {"gpt-2": True, "smollm": True, "llama-bpe": False, "qwen2": False}[split]  # ByteLevel splits by itself
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)]
    if split == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif not whole:
        pattern = LLAMA3_SPLIT if split == "llama-bpe" else QWEN2_SPLIT
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    backend = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")], trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    if split == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", SPECIAL.index("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>" if split == "llama-bpe" else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def base(folder: Path, kind: str, split: str, *, dtype: str = "float32", **changes) -> Path:
    """A model with random weights, norms and biases, and more rows than its tokenizer has tokens."""
    tokenizer = bpe(split)
    config = AutoConfig.for_model(
        kind,
        vocab_size=640,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        eos_token_id=tokenizer.eos_token_id,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}, **SHAPES.get(kind, {}), **changes},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path) -> str:
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), random_lora()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "split", "tied", "dtype"),
    [
        ("llama", "llama-bpe", True, "float32"),
        ("llama", "smollm", False, "bfloat16"),
        ("llama", "gpt-2", True, "bfloat16"),
        ("qwen2", "qwen2", True, "float32"),
        ("qwen3", "qwen2", False, "float32"),
    ],
)
def test_the_merged_model_is_read_back(tmp_path, capsys, gguf, kind, split, tied, dtype):
    """Logits are equal to the last bit, and so are ids of texts with special tokens, added tokens, digits and spaces.
    Rows of q or k in the wrong order, a wrong RoPE base or a lost bias would change the logits."""
    adapter = adapter_on(base(tmp_path / "base", kind, split, dtype=dtype, tie_word_embeddings=tied), tmp_path / "lora")
    out, file = tmp_path / "merged", tmp_path / "files/model.gguf"
    cli.main(["merge", adapter, str(out), "--dtype", dtype, "--gguf", str(file)])
    printed = capsys.readouterr().out
    assert f"{file} read by transformers compared with the merged model: largest logit difference 0 (" in printed

    merged, read = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
        for folder, more in ((out, {}), (file.parent, {"gguf_file": file.name}))
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    for expected, logits in zip(*(compute_logits(model, tokenizer) for model in (merged, read)), strict=True):
        assert torch.equal(expected, logits)
    assert read.config.tie_word_embeddings == tied

    found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (*TEXTS, *MORE_TEXTS):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"], text
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "chat_template"):
        assert getattr(found, name) == getattr(tokenizer, name), name
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == split  # llama.cpp splits by this name; transformers not always
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[: len(SPECIAL)] == [gguf.TokenType.CONTROL] * len(SPECIAL)
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED
    assert types[len(tokenizer) :] == [gguf.TokenType.UNUSED] * (640 - len(tokenizer))


def test_rows_of_a_rotated_head(tmp_path, gguf):
    """llama.cpp rotates channels (0, 1), (2, 3) of a head, transformers (0, 2), (1, 3): worked out by hand for heads of
    4 channels. k has fewer heads than q."""
    folder = base(tmp_path / "base", "llama", "gpt-2", hidden_size=16)
    write_gguf(folder, tmp_path / "model.gguf", dtype="float32")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    attention = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].self_attn
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]
    assert torch.equal(tensors["blk.1.attn_q.weight"], attention.q_proj.weight[order])
    assert torch.equal(tensors["blk.1.attn_k.weight"], attention.k_proj.weight[order[:8]])
    assert torch.equal(tensors["blk.1.attn_v.weight"], attention.v_proj.weight)


def replace_in_tokenizer(folder: Path, old: str, new: str) -> None:
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", HEADS | {"hidden_size": 32}, "the architecture 'mistral', only llama, qwen2, qwen3"),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, r"RoPE scaling \('llama3'\)"),
        ("llama", {"attention_bias": True}, "biases in 'llama'"),
        ("llama", {"head_dim": 16}, "heads of 16 channels in this 'llama', only 8"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("qwen3", {"head_dim": 8}, "heads of 8 channels in this 'qwen3', only 128"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding-window attention"),
    ],
)
def test_models_that_are_not_covered(tmp_path, gguf, kind, changes, message):
    """A file with wrong logits in llama.cpp would be worse than none."""
    folder = base(tmp_path / "base", kind, "gpt-2", **changes)
    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=f"--gguf does not cover {message}.*convert_hf_to_gguf.py {folder} --outfile"):
        write_gguf(folder, file, dtype="float32")
    assert not file.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"individual_digits": true', '"individual_digits": false', "this tokenizer, only byte-level BPE split as in"),
        ('"ignore_merges": false', '"ignore_merges": true', "this tokenizer, only byte-level BPE split as in"),
        ('"normalizer": null', '"normalizer": {"type": "Lowercase"}', "the normalizer 'Lowercase'"),
        ('"lstrip": false', '"lstrip": true', "added tokens that depend on the text around them"),
    ],
)
def test_tokenizers_that_are_not_covered(tmp_path, gguf, old, new, message):
    """llama.cpp would read other ids from the same text."""
    folder = base(tmp_path / "base", "llama", "smollm")
    replace_in_tokenizer(folder, old, new)
    with pytest.raises(ValueError, match=f"--gguf does not cover {message}"):
        write_gguf(folder, tmp_path / "model.gguf", dtype="float32")


def test_what_is_refused_by_the_command(tmp_path, gguf):
    """Before anything is merged if the file is the problem; otherwise, the merged model is there to be converted."""
    adapter = adapter_on(TINY_MODEL, tmp_path / "lora")
    out, file = tmp_path / "merged", tmp_path / "model.gguf"
    file.touch()
    for name, message in ((file, "model.gguf' exists"), (tmp_path / "model.bin", "does not end in .gguf")):
        with pytest.raises(SystemExit, match=message):
            cli.main(["merge", adapter, str(out), "--gguf", str(name)])
        assert not out.exists()
    file.unlink()
    with pytest.raises(SystemExit, match="does not cover this tokenizer, only byte-level BPE"):
        cli.main(["merge", adapter, str(out), "--gguf", str(file)])
    assert not file.exists()
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r'pip install "grpo-ext\[gguf\]"'):
        cli.main(["merge", "no/adapter", str(tmp_path / "out"), "--gguf", str(tmp_path / "model.gguf")])
