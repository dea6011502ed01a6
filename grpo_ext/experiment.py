"""One run from the banner to the verdict: what every recipe does around its task.

banner -> checks and a rehearsal -> held-out accuracy before, kept for sessions that resume the run -> training, with
accuracy every `eval_steps` -> accuracy after -> adapter, card, `metrics.jsonl`, `curves.png`, `report.html`,
`summary.json` in `output_dir` -> the verdict as the last line
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl.distributed import DistributedBackend

from grpo_ext.checkpoints.best import BestAdapter, read_best
from grpo_ext.console import banner
from grpo_ext.data import Problems
from grpo_ext.evaluation.callback import (
    SHOWN_PROBLEMS,
    HeldOutAccuracy,
    append_evaluation,
    as_metrics,
    load_before,
    save_before,
)
from grpo_ext.evaluation.complete import Evaluation, Problem, evaluate
from grpo_ext.report.page import write_page
from grpo_ext.report.png_plots import draw_curves
from grpo_ext.report.summary import summarise, verdict, write_summary
from grpo_ext.report.warn_on_error import attempt
from grpo_ext.trainer import GRPOExtTrainer
from rewards.completion import text_of


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
        The contents of `summary.json`; nothing where `dry_run` ends the run before its first step.
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
        template_kwargs=args.chat_template_kwargs,
    )
    banner.show(trainer, model_name=base_model, data=f"{len(problems.train)} problems; held out: {problems.note}")
    trainer.preflight()
    if args.dry_run:
        print("dry run: the checks are through, nothing was trained")
        return {}
    resumed = trainer.find_checkpoint(args.resume_from_checkpoint)
    before = load_before(args.output_dir, problems=len(heldout), samples=eval_samples) if resumed else None
    if before is None:  # the policy is still the one that training began with
        with DistributedBackend(trainer.accelerator).gather_params(list(trainer.model.parameters())):
            before = measure(samples=eval_samples, description="held-out accuracy before")
        if trainer.accelerator.is_main_process:
            save_before(args.output_dir, before)
    during = partial(measure, samples=min(eval_samples, 1))
    record = partial(_record, trainer, heldout)
    trainer.add_callback(BestAdapter(trainer))
    trainer.add_callback(HeldOutAccuracy(before, during, record))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.monotonic() - started
    after = measure(samples=eval_samples, description="held-out accuracy after")
    record(after)
    summary = summarise(trainer, recipe=recipe, base_model=base_model, seconds=seconds, before=before, after=after)

    if trainer.accelerator.is_main_process:
        write_summary(args.output_dir, summary)
        attempt(draw_curves, args.output_dir)
    trainer.save_model()  # with a card of both; pushed, where that was asked for
    if trainer.accelerator.is_main_process:
        _show_samples(heldout, before, after)
        print(f"adapter, report.html, curves.png, metrics.jsonl and summary.json are in {args.output_dir}")
        best = read_best(args.output_dir)
        if best and best["pass@1"] > after.greedy.value:
            print(
                f"the best adapter, of step {best['step']} with held-out pass@1 {best['pass@1']:.2f}, is in its best/"
            )
        print(verdict(summary))
    return summary


def _record(trainer: GRPOExtTrainer, heldout: list[Problem], evaluation: Evaluation) -> None:
    """Log an evaluation at the step that the run is at, and write the report as it is by then."""
    trainer.log_alone(as_metrics(evaluation))
    if trainer.accelerator.is_main_process:
        append_evaluation(trainer.args.output_dir, trainer.state.global_step, evaluation, heldout)
        attempt(write_page, trainer.args.output_dir)


def _show_samples(heldout: list[Problem], before: Evaluation, after: Evaluation) -> None:
    """The first few held-out problems with the greedy answers before and after, right ones marked."""
    table = Table(title="Held-out problems, greedy answers", title_justify="left", show_lines=True)
    for column in ("problem", "before", "after"):
        table.add_column(column, overflow="fold")
    for i, problem in enumerate(heldout[:SHOWN_PROBLEMS]):
        answers = [
            Text(text_of(e.completions[i])[:300].strip(), "green" if e.right[i] else "red")
            + Text("  (right)" if e.right[i] else "  (wrong)")
            for e in (before, after)
        ]
        table.add_row(Text(text_of(problem["prompt"])[-300:].strip()), *answers)
    Console().print(table)


def _short_name(name_or_path: str) -> str:
    """A Hub id as it is; a local folder relative to the current one where it lies below it."""
    path = Path(name_or_path)
    return str(path.relative_to(Path.cwd())) if path.is_dir() and path.is_relative_to(Path.cwd()) else name_or_path
