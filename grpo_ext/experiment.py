"""One run from the banner to the verdict: what every recipe does around its task.

banner -> held-out accuracy before -> training, with accuracy every `eval_steps` -> accuracy after
-> adapter, card, `metrics.jsonl`, `curves.png`, `summary.json` in `output_dir` -> the verdict as the last line
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_ext.data import Problems
from grpo_ext.report.curves import draw_curves
from grpo_ext.report.evaluation import Completion, Evaluation, Problem, evaluate
from grpo_ext.report.heldout import HeldOutAccuracy, as_metrics
from grpo_ext.report.summary import summarise, verdict, write_summary
from grpo_ext.run import banner
from grpo_ext.trainer import GRPOExtTrainer

SHOWN_PROBLEMS = 4


def run(
    trainer: GRPOExtTrainer,
    problems: Problems,
    reward: Any,
    *,
    recipe: str,
    eval_samples: int = 0,
    evaluate: Callable[..., Evaluation] = evaluate,
) -> dict[str, object]:
    """Train and report.

    Args:
        trainer: built, not yet trained.
        problems: its held-out rows are evaluated; they must not be trained on.
        reward: what `evaluate` judges held-out answers by: a reward function, 1.0 for a right answer.
        recipe: name of the recipe, for the summary.
        eval_samples: answers sampled per held-out problem before and after training; 0 for greedy accuracy only.
        evaluate: `report.evaluation.evaluate`, or what takes the same arguments.

    Returns:
        The contents of `summary.json`.
    """
    args = trainer.args
    heldout = problems.heldout.to_list()
    base_model = _short_name(trainer.model.config.name_or_path)
    measure = partial(
        evaluate,
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        heldout,
        reward,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )
    banner.show(trainer, model_name=base_model, data=f"{len(problems.train)} problems; held out: {problems.note}")
    before = measure(samples=eval_samples, description="held-out accuracy before")
    during = partial(measure, samples=min(eval_samples, 1))
    trainer.add_callback(HeldOutAccuracy(before, during, trainer.log_alone))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.monotonic() - started
    after = measure(samples=eval_samples, description="held-out accuracy after")
    trainer.log_alone(as_metrics(after))
    summary = summarise(trainer, recipe=recipe, base_model=base_model, seconds=seconds, before=before, after=after)

    trainer.save_model()
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(model_name=recipe)
        write_summary(args.output_dir, summary)
        draw_curves(args.output_dir)
        _show_samples(heldout, before, after)
        print(f"adapter, metrics.jsonl, curves.png and summary.json are in {args.output_dir}")
        print(verdict(summary))
    return summary


def _show_samples(heldout: list[Problem], before: Evaluation, after: Evaluation) -> None:
    """The first few held-out problems with the greedy answers before and after, right ones marked."""
    table = Table(title="Held-out problems, greedy answers", title_justify="left", show_lines=True)
    for column in ("problem", "before", "after"):
        table.add_column(column, overflow="fold")
    for i, problem in enumerate(heldout[:SHOWN_PROBLEMS]):
        answers = [
            Text(_text(e.completions[i])[:300].strip(), "green" if e.right[i] else "red")
            + Text("  (right)" if e.right[i] else "  (wrong)")
            for e in (before, after)
        ]
        table.add_row(Text(_text(problem["prompt"])[-300:].strip()), *answers)
    Console().print(table)


def _short_name(name_or_path: str) -> str:
    """A Hub id as it is; a local folder relative to the current one where it lies below it."""
    path = Path(name_or_path)
    return str(path.relative_to(Path.cwd())) if path.is_dir() and path.is_relative_to(Path.cwd()) else name_or_path


def _text(message: Completion) -> str:
    return message if isinstance(message, str) else message[-1]["content"]
