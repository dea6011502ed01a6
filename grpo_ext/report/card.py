"""The model card, `README.md` of a run: how to load it, what it is worth, how it came about.

It is written with every save, so that of an interrupted run there is one, too; accuracy comes in with `summary.json`.
A base model is named where it has a name on the Hub. A local path is never written: whoever reads the card does not
have that folder, and its name tells more than was meant to be told.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from grpo_ext.console.banner import describe
from grpo_ext.evaluation.complete import Estimate
from grpo_ext.report.png_plots import CURVES_FILE
from grpo_ext.report.summary import PACKAGES, SUMMARY_FILE

CARD_FILE = "README.md"
CARD_TAG = "grpo-ext"  # of ours; PEFT writes cards, too
HERE = '"."'  # in the code of the card: the folder that it lies in
LOCAL_BASE = "PATH/OF/THE/BASE/MODEL"
OBJECTIVE = ("loss_type", "scale_rewards", "epsilon", "beta", "kl_estimator", "entropy_coef", "temperature")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")

ADAPTER_CODE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, {here})
generate = pipeline("text-generation", model=model, tokenizer={here})
print(generate({prompt}, max_new_tokens={tokens}))"""
MODEL_CODE = """from transformers import pipeline

generate = pipeline("text-generation", model={here})
print(generate({prompt}, max_new_tokens={tokens}))"""

BODY = """# {title}

{what}

```python
{code}
```

## Accuracy on held-out problems

{accuracy}

{curves}## How it was trained

| | |
| --- | --- |
{settings}

{versions}

GRPO: Shao et al., DeepSeekMath ([arXiv:2402.03300](https://arxiv.org/abs/2402.03300)). Trained with grpo-ext on
[TRL](https://github.com/huggingface/trl) (von Werra et al., 2020).
"""


def write_card(
    trainer: GRPOTrainer,
    folder: str | Path,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write the card into a folder that holds, or will hold, the adapter or model of this trainer.

    Args:
        model_name: the title; by default the name of the repository that is pushed to, or of the output folder.
        dataset_name: on the Hub; by default the name that `grpo_ext.data` gave to the training data.
        tags: beside those that are given in any case.
    """
    folder = Path(folder)
    path = folder / SUMMARY_FILE
    summary = json.loads(path.read_text()) if path.exists() else None
    is_adapter = _is_adapter(trainer)
    base, data = hub_name_of_base(trainer.model), dataset_name or _name_of_data(trainer)
    title = model_name or Path(trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute()).name
    added = [tags] if isinstance(tags, str) else tags or []
    metadata = ModelCardData(
        model_name=title,
        base_model=base,
        datasets=data,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*trainer.tag_names, CARD_TAG, *(["peft"] if is_adapter else []), *added],
        eval_results=_results(summary, data) if summary else None,
    )
    body = BODY.format(
        title=title,
        what=_what(trainer, base, data),
        code=_code(trainer, base),
        accuracy=_accuracy(trainer, summary),
        curves=f"![Curves of the run]({CURVES_FILE})\n\n" if (folder / CURVES_FILE).exists() else "",
        settings="\n".join(f"| {label} | {text} |" for label, text in _settings(trainer, base).items()),
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
    )
    ModelCard(f"---\n{metadata}\n---\n\n{body}").save(folder / CARD_FILE)


def read_card(folder: str | Path) -> ModelCard | None:
    """The card of a folder; None where there is none, or one that PEFT or a person wrote."""
    path = Path(folder, CARD_FILE)
    card = ModelCard.load(path) if path.exists() else None
    return card if card is not None and CARD_TAG in (card.data.tags or []) else None


def for_hub(card: str, repository: str) -> str:
    """The text of a card whose code loads the repository in place of the folder that the card lies in."""
    return card.replace(HERE, f'"{repository}"')


def hub_name_of_base(model: Any) -> str | None:
    """`Qwen/Qwen2.5-0.5B`, or None where the model came from a folder or from memory."""
    name = get_config_model_id(model.config)
    return name if name and HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _name_of_data(trainer: GRPOTrainer) -> str | None:
    """`openai/gsm8k`; None for data that is not known to be on the Hub."""
    info = getattr(trainer.train_dataset, "info", None)
    return info.dataset_name if info is not None and "/" in (info.dataset_name or "") else None


def _what(trainer: GRPOTrainer, base: str | None, data: str | None) -> str:
    kind = "An adapter for" if _is_adapter(trainer) else "A fine-tuned version of"
    model = f"a local {trainer.model.config.model_type} model, which has no name on the Hub"
    if base is not None:
        model = f"[{base}](https://huggingface.co/{base})"
    source = f"[{data}](https://huggingface.co/datasets/{data})" if data else "local problems"
    return f"{kind} {model}, trained with GRPO on {source}."


def _code(trainer: GRPOTrainer, base: str | None) -> str:
    """Six lines that load what was trained and answer one prompt."""
    first = next(iter(trainer.train_dataset))["prompt"]
    return (ADAPTER_CODE if _is_adapter(trainer) else MODEL_CODE).format(
        base=base or LOCAL_BASE,
        here=HERE,
        prompt='"Your question"' if isinstance(first, str) else '[{"role": "user", "content": "Your question"}]',
        tokens=trainer.args.max_completion_length,
    )


def _accuracy(trainer: GRPOTrainer, summary: dict[str, Any] | None) -> str:
    """The table of accuracy before and after, or a sentence where the run has not finished."""
    if summary is None:
        return f"Not measured when this was saved, after step {trainer.state.global_step}."
    lines = ["| | before | after | problems |", "| --- | --- | --- | --- |"]
    for label, before, after in _measures(summary):
        lines.append(f"| {label} | {Estimate(**before)} | {Estimate(**after)} | {after['n']} |")
    lines += ["", f"With 95% intervals; {summary['steps']} steps, {summary['seconds']:.0f} s on {summary['device']}."]
    return "\n".join(lines)


def _measures(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, figures before, figures after, of what was measured."""
    names = {"greedy pass@1": "pass_at_1", "sampled pass@1": "sampled_pass_at_1", f"pass@{summary['k']}": "pass_at_k"}
    pairs = [(label, summary[f"{name}_before"], summary[f"{name}_after"]) for label, name in names.items()]
    return [(label, before, after) for label, before, after in pairs if before and after]


def _results(summary: dict[str, Any], data: str | None) -> list[EvalResult]:
    """The same for the model index of the Hub: the value after, with its interval and the value before."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data or "local",
            dataset_name=f"held-out problems of {data}" if data else "held-out problems",
            metric_type="pass@1" if "@1" in label else label,
            metric_name=label,
            metric_value=after["value"],
            metric_args={"low": after["low"], "high": after["high"], "n": after["n"], "before": before},
        )
        for label, before, after in _measures(summary)
    ]


def _settings(trainer: GRPOTrainer, base: str | None) -> dict[str, str]:
    """Rewards, objective, adapter, and what the banner says of model and steps, label -> text."""
    said = describe(trainer, model_name=base or "a local model", data="")
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    settings = {
        "base": said["model"],
        "rewards": ", ".join(f"`{name}`" if weight == 1.0 else f"{weight:g} x `{name}`" for name, weight in rewards),
        "objective": "`" + ", ".join(f"{name}={getattr(trainer.args, name)!r}" for name in OBJECTIVE) + "`",
    }
    if _is_adapter(trainer):
        config = trainer.model.active_peft_config
        size = f", r={config.r}, alpha={config.lora_alpha}" if isinstance(config, LoraConfig) else ""
        settings["adapter"] = f"{config.peft_type.value}{size}"
    return settings | {label: said[label] for label in ("trains", "reference", "one step", "steps")}


def _is_adapter(trainer: GRPOTrainer) -> bool:
    return hasattr(trainer.model, "peft_config")
