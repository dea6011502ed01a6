"""`grpo-ext merge`: the merged model equals base and adapter up to rounding, including with tied embeddings."""

import warnings

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from grpo_ext import cli
from grpo_ext.model.merge import TEXTS
from tests.tools.models import random_lora
from tests.tools.paths import TINY_MODEL

LAYERS = ["q_proj", "v_proj", "down_proj"]


def saved(config, folder):
    """An adapter on the embedded model (tied embeddings) whose trained weights all have a visible effect."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def logits_of(model):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    with torch.no_grad():
        return [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].float() for text in TEXTS]


def adapted(adapter):
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), adapter))


def distance(one, other):
    """The largest difference, relative to the largest value."""
    pairs = list(zip(one, other, strict=True))
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
@pytest.mark.parametrize(
    ("targets", "more"),
    [
        ("all-linear", {}),
        ([*LAYERS, "lm_head"], {}),
        ([*LAYERS, "embed_tokens"], {}),
        (LAYERS, {"modules_to_save": ["embed_tokens"]}),
        (LAYERS, {"modules_to_save": ["lm_head"]}),
        ([*LAYERS, "lm_head"], {"ensure_weight_tying": True}),
    ],
    ids=str,
)
def test_merged_is_base_and_adapter(tmp_path, targets, more):
    """Loaded by plain transformers. If head and embedding share a weight, merging into it would change both, and a
    model saved as tied would lose one of the two."""
    adapter = saved(random_lora(target_modules=targets, **more), tmp_path / "adapter")
    expected = adapted(adapter)
    with warnings.catch_warnings(record=True, action="always") as caught:
        cli.main(["merge", adapter, str(tmp_path / "merged"), "--dtype", "float32"])
    assert not [warning for warning in caught if "You can untie the embeddings" in str(warning.message)]  # done
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits_of(merged), expected) < 1e-5
    assert merged.config.tie_word_embeddings == (targets == "all-linear")
    assert distance(logits_of(AutoModelForCausalLM.from_pretrained(TINY_MODEL)), expected) > 0.1


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_a_trained_adapter_on_a_tied_head(build, tiny_model, tmp_path, capsys):
    """Our trainer saves only the head's factors; merged into bfloat16, the model loads and generates."""
    lora = random_lora(target_modules=[*LAYERS, "lm_head"])
    trainer = build(tiny_model, peft_config=lora, max_steps=1, beta=0.0)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "merged"
    cli.main(["merge", trainer.args.output_dir, str(out)])
    printed = capsys.readouterr().out

    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TINY_MODEL).get_vocab()
    assert GenerationConfig.from_pretrained(out).eos_token_id == tiny_model.generation_config.eos_token_id
    assert merged.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4).shape == (1, 8)

    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.bfloat16)
    unmerged = logits_of(PeftModel.from_pretrained(base, trainer.args.output_dir))
    pairs = list(zip(logits_of(merged), unmerged, strict=True))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in pairs)
    assert difference > 0  # bfloat16 has 8 bits of precision
    positions = sum(len(a) for a, _ in pairs)
    assert f"largest logit difference {difference:.2g} (" in printed
    assert f"the same at {same / positions:.1%} of {positions} positions" in printed
    cli.main(["merge", trainer.args.output_dir, f"{out}32", "--dtype", "float32"])
    merged = AutoModelForCausalLM.from_pretrained(f"{out}32")
    assert distance(logits_of(merged), adapted(trainer.args.output_dir)) < 1e-5


def test_what_cannot_be_merged(tmp_path):
    """Each error says what to type, and no folder that looks like a model is left behind."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(TINY_MODEL, quantization_config=four_bits).save_pretrained(tmp_path / "4bit")
    adapter = saved(random_lora(), tmp_path / "adapter")
    prompts = saved(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), tmp_path / "prompts")
    nameless = saved(random_lora(), tmp_path / "nameless")
    config = tmp_path / "nameless/adapter_config.json"
    config.write_text(config.read_text().replace(f'"{TINY_MODEL}"', "null"))
    out = str(tmp_path / "out")
    for arguments, message in (
        (
            [adapter, out, "--base", str(tmp_path / "4bit")],
            "4bit' is quantised.* Add --base NAME, the same model in bf",
        ),
        ([prompts, out], "is a PROMPT_TUNING adapter, which has no weights to merge"),
        ([nameless, out], "does not name its base model. Add --base NAME"),
        ([adapter, adapter], "is not empty. Name a new folder"),
        ([str(tmp_path), out], "adapter_config.json"),
        ([adapter, out, "--base", "no/such"], "'no/such' is not a local path and could not be fetched"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["merge", *arguments])
    assert not (tmp_path / "out").exists()
    cli.main(["merge", nameless, out, "--base", str(TINY_MODEL)])
    assert (tmp_path / "out/model.safetensors").exists()
