"""The model card, `README.md` of a run: how to load the model, its accuracy, and how it was trained.

The card is written with every save, so an interrupted run has one too. It shows accuracy if there is a `summary.json`,
and names the base model if that is on the Hub. It never contains a local path, which is useless to readers and may
reveal private names.
"""

import json
import re
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from grpo_ext.evaluation.estimates import Estimate
from grpo_ext.machine import package_versions
from grpo_ext.report.run_files import CARD_FILE, CURVES_FILE, SUMMARY_FILE
from grpo_ext.run_description import describe_run

logger = get_logger(__name__)

CARD_TAG = "grpo-ext"  # marks cards written here; PEFT writes cards too
THIS_FOLDER = '"."'  # the folder of the card, in the card's code
LOCAL_BASE_PLACEHOLDER = "PATH/OF/THE/BASE/MODEL"
OBJECTIVE_FIELDS = ("loss_type", "scale_rewards", "epsilon", "beta", "kl_estimator", "entropy_coef", "temperature")
HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")

ADAPTER_CODE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, {here})
generate = pipeline("text-generation", model=model, tokenizer={here})
print(generate({prompt}, max_new_tokens={tokens}))"""
MODEL_CODE = """from transformers import pipeline

generate = pipeline("text-generation", model={here})
print(generate({prompt}, max_new_tokens={tokens}))"""

CARD_TEMPLATE = """# {title}

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
    """Write the card into a folder that contains, or will contain, the adapter or model of this trainer.

    Args:
        model_name: title of the card; by default the name of the Hub repository to push to, or of the output folder.
        dataset_name: name of the data set on the Hub; by default the name that `grpo_ext.data` gave to the training
            data.
        tags: tags in addition to those of every card.
    """
    folder = Path(folder)
    path = folder / SUMMARY_FILE
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    is_adapter = _is_adapter(trainer)
    base, data = base_hub_name(trainer.model), dataset_name or _dataset_hub_name(trainer)
    title = model_name or Path(trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute()).name
    added = [tags] if isinstance(tags, str) else tags or []
    metadata = ModelCardData(
        model_name=title,
        base_model=base,
        datasets=data,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*trainer.card_tags, CARD_TAG, *(["peft"] if is_adapter else []), *added],
        eval_results=_eval_results(summary, data) if summary else None,
    )
    body = CARD_TEMPLATE.format(
        title=title,
        what=_introduction(trainer, base, data),
        code=_usage_code(trainer, base),
        accuracy=_accuracy_section(trainer, summary),
        curves=f"![Curves of the run]({CURVES_FILE})\n\n" if (folder / CURVES_FILE).exists() else "",
        settings="\n".join(f"| {label} | {text} |" for label, text in _training_settings(trainer, base).items()),
        versions=", ".join(f"{package} {version}" for package, version in package_versions().items()),
    )
    ModelCard(f"---\n{metadata}\n---\n\n{body}").save(folder / CARD_FILE)


def write_card_or_warn(trainer: GRPOTrainer, folder: str | Path, **options: Any) -> None:
    """Call `write_card`; an error becomes a warning, because a missing card must not end a run."""
    try:
        write_card(trainer, folder, **options)
    except Exception as error:  # data and models of users may raise anything while the card is written
        logger.warning(f"The model card of {folder} could not be written: {error!r}")


def read_card(folder: str | Path) -> ModelCard | None:
    """The card of a folder if `write_card` wrote it; None for a card of PEFT or of a person, or if there is none."""
    path = Path(folder, CARD_FILE)
    card = ModelCard.load(path) if path.exists() else None
    return card if card is not None and CARD_TAG in (card.data.tags or []) else None


def load_from_repository(card: str, repository: str) -> str:
    """The text of a card whose code loads this repository instead of the folder of the card."""
    return card.replace(THIS_FOLDER, f'"{repository}"')


def base_hub_name(model: Any) -> str | None:
    """`Qwen/Qwen2.5-0.5B`; None if the model came from a folder or from memory."""
    name = get_config_model_id(model.config)
    return name if name and HUB_NAME_PATTERN.fullmatch(name) and not Path(name).exists() else None


def _dataset_hub_name(trainer: GRPOTrainer) -> str | None:
    """`openai/gsm8k`; None if the data is local or its name is unknown."""
    info = getattr(trainer.train_dataset, "info", None)
    return info.dataset_name if info is not None and "/" in (info.dataset_name or "") else None


def _introduction(trainer: GRPOTrainer, base: str | None, data: str | None) -> str:
    kind = "An adapter for" if _is_adapter(trainer) else "A fine-tuned version of"
    model = f"a local {trainer.model.config.model_type} model that is not on the Hub"
    if base is not None:
        model = f"[{base}](https://huggingface.co/{base})"
    source = f"[{data}](https://huggingface.co/datasets/{data})" if data else "local problems"
    return f"{kind} {model}, trained with GRPO on {source}."


def _usage_code(trainer: GRPOTrainer, base: str | None) -> str:
    """Six lines of code that load the trained model and answer one prompt."""
    return (ADAPTER_CODE if _is_adapter(trainer) else MODEL_CODE).format(
        base=base or LOCAL_BASE_PLACEHOLDER,
        here=THIS_FOLDER,
        prompt='[{"role": "user", "content": "Your question"}]' if _has_chat_prompts(trainer) else '"Your question"',
        tokens=trainer.args.max_completion_length,
    )


def _has_chat_prompts(trainer: GRPOTrainer) -> bool:
    """Whether prompts are messages; for data that cannot be indexed, whether the tokenizer has a chat template."""
    data = trainer.train_dataset
    first = data[0] if isinstance(data, Dataset) else {}
    if "prompt" in first:
        return not isinstance(first["prompt"], str)
    return trainer.processing_class.chat_template is not None


def _accuracy_section(trainer: GRPOTrainer, summary: dict[str, Any] | None) -> str:
    """A table of accuracy before and after, or a sentence if the run has not finished."""
    if summary is None:
        return f"Not measured before this was saved (after step {trainer.state.global_step})."
    lines = ["| | before | after | problems |", "| --- | --- | --- | --- |"]
    for label, before, after in _before_and_after(summary):
        lines.append(f"| {label} | {Estimate(**before)} | {Estimate(**after)} | {after['n']} |")
    lines += [
        "",
        f"Brackets: 95% intervals. Training took {summary['steps']} steps and {summary['seconds']:.0f} s on "
        f"{summary['device']}.",
    ]
    return "\n".join(lines)


def _before_and_after(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, estimate before and estimate after, for each measure that the run evaluated."""
    names = {"greedy pass@1": "pass_at_1", "greedy pass@1, any format": "lenient_pass_at_1"}
    names |= {"sampled pass@1": "sampled_pass_at_1", f"pass@{summary['k']}": "pass_at_k"}
    pairs = [(label, summary.get(f"{name}_before"), summary.get(f"{name}_after")) for label, name in names.items()]
    return [(label, before, after) for label, before, after in pairs if before and after]


def _eval_results(summary: dict[str, Any], data: str | None) -> list[EvalResult]:
    """The accuracy for the Hub's model index: the value after training, its interval, and the estimate before."""
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
        for label, before, after in _before_and_after(summary)
    ]


def _training_settings(trainer: GRPOTrainer, base: str | None) -> dict[str, str]:
    """Base, rewards, objective, adapter and steps of the run, label -> text; some are lines of the banner."""
    description = describe_run(trainer, model_name=base or "a local model", data="")
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    settings = {
        "base": description["model"],
        "rewards": ", ".join(f"`{name}`" if weight == 1.0 else f"{weight:g} x `{name}`" for name, weight in rewards),
        "objective": "`" + ", ".join(f"{name}={getattr(trainer.args, name)!r}" for name in OBJECTIVE_FIELDS) + "`",
    }
    if _is_adapter(trainer):
        config = trainer.model.active_peft_config
        size = f", r={config.r}, alpha={config.lora_alpha}" if isinstance(config, LoraConfig) else ""
        settings["adapter"] = f"{config.peft_type.value}{size}"
    return settings | {label: description[label] for label in ("trains", "reference", "one step", "steps")}


def _is_adapter(trainer: GRPOTrainer) -> bool:
    return hasattr(trainer.model, "peft_config")
