"""Shared by all recipes: flags -> problems and trainer -> a run -> its result as the last line.

Every field of GRPOExtConfig, of TRL's ModelConfig and of the recipe's own arguments is a flag, or a line of a YAML file
given by `--config`; flags take precedence. If that file does not exist, it is searched in the folder of the recipes. In
the name of a model or data set, `$RECIPES` is replaced with this folder. `--num_generations auto` is resolved before
the run (`memory/auto_group_size.py`). `--algorithm NAME` changes defaults (`algorithms.py`). A run

1. prints the banner, and runs the checks and a step of the largest shape;
2. measures held-out accuracy, and keeps the result for sessions that resume the run;
3. trains, and measures accuracy every `eval_steps` steps;
4. measures accuracy again, and writes adapter, card, curves, report and `summary.json` to `output_dir`.

Ctrl-C, SIGTERM and `--max_hours` end a run after its current step, with a checkpoint and the report; the last line is
the command that continues it (`checkpoints/stop.py`).
"""

import os
import signal
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, TrlParser, get_peft_config
from trl.distributed import DistributedBackend

from grpo_ext.algorithms import ALGORITHMS, algorithm, describe_algorithm, overlong_punishment
from grpo_ext.checkpoints.best import BestAdapter, read_best
from grpo_ext.checkpoints.stop import Stopped
from grpo_ext.config import GRPOExtConfig
from grpo_ext.console.banner import show_banner
from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import escaping_unencodable, show
from grpo_ext.data import DEFAULT_FORMAT, Problems, PromptFormat, load_problems
from grpo_ext.evaluation.callback import HeldOutAccuracy, load_initial_evaluation, save_initial_evaluation
from grpo_ext.evaluation.complete import Evaluation, Problem, evaluate
from grpo_ext.machine import use_expandable_segments
from grpo_ext.memory.auto_group_size import parse_flags, read_config, with_group_size
from grpo_ext.model.load import PolicyConfig, model_init_kwargs, quantization
from grpo_ext.report.heldout_file import SHOWN_PROBLEMS, HeldoutFile, append_evaluation, evaluation_metrics
from grpo_ext.report.page import write_page
from grpo_ext.report.png_plots import draw_curves
from grpo_ext.report.run_files import draw_or_warn
from grpo_ext.report.run_settings import redact, resume_command
from grpo_ext.report.summary import accuracy_lines, build_summary, write_summary
from grpo_ext.rewards.completion import text_of
from grpo_ext.rewards.lenient import lenient_version
from grpo_ext.rollout.reward_workers import close_workers, in_workers
from grpo_ext.trainer import GRPOExtTrainer


@dataclass
class RecipeArguments(ScriptArguments):
    """The arguments that every recipe adds to those of TRL's scripts (`dataset_name`, `dataset_config`, splits)."""

    algorithm: str | None = field(
        default=None,
        metadata={
            "help": f"A named algorithm of the literature, which sets the fields of its objective: "
            f"{', '.join(ALGORITHMS)}. Other flags win, and so do the values of a YAML "
            "file that names the algorithm itself. Unset: the defaults, which are those of deepseek.",
            "choices": list(ALGORITHMS),
        },
    )
    max_eval_prompts: int = field(
        default=256,
        metadata={
            "help": "Maximum number of held-out problems, 1 or more. 256 (recommended) give an interval of +-0.06."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the question, with dots for the keys of a dict (extra.question). Unset: recognised by "
            "name (prompt, question, problem, ...)."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the gold answer, with dots for the keys of a dict (reward_model.ground_truth). Unset: "
            "recognised by name (answer, final_answer, solution, ...)."
        },
    )
    unreadable_gold: str = field(
        default="error",
        metadata={
            "help": "What to do with rows without a question, or whose gold answer is missing or unreadable: 'error' "
            "lists them and ends the run (recommended for your own data); 'drop' leaves them out, and the banner "
            "gives their number.",
            "choices": ["error", "drop"],
        },
    )
    chat: str = field(
        default="auto",
        metadata={
            "help": "Whether prompts become chat messages. 'auto' (recommended): if the chat template ends a turn with "
            "an end-of-sequence token of the model. A base model that merely ships a template gets plain prompts.",
            "choices": ["auto", "true", "false"],
        },
    )
    eval_samples: int = field(
        default=0,
        metadata={
            "help": "Number of completions sampled per held-out problem before and after training, for pass@k, 0 or "
            "more; 0 for greedy accuracy only. Recommended: 8."
        },
    )


Arguments = TypeVar("Arguments", bound=RecipeArguments)

# Flags that only matter to a run that reads a data set.
DATA_FLAGS = (
    *("dataset_config", "dataset_train_split", "dataset_test_split"),
    *("prompt_column", "answer_column", "unreadable_gold"),
)


# Flags -> problems and trainer


def prepare_process() -> None:
    """Silence libraries, and keep the folder of the recipes off the import path of child processes."""
    os.environ["PYTHONSAFEPATH"] = "1"
    quiet_libraries()


def parse_arguments(
    argv: list[str], recipe: str, folder: str, *, embedded: str, arguments: type[Arguments]
) -> tuple[Arguments, GRPOExtConfig, PolicyConfig]:
    """The arguments of a run: those of the embedded run if `argv` names no model, no data and no config file.

    Args:
        recipe: name of the recipe.
        folder: folder of the recipes.
        embedded: name of the YAML file of the embedded run, in that folder.
        arguments: dataclass with the recipe's own flags.
    """
    folder = str(Path(folder).resolve())
    parser = TrlParser((arguments, GRPOExtConfig, PolicyConfig), allow_abbrev=False)
    parser.set_defaults(output_dir=f"outputs/{recipe}", logging_steps=1, eval_steps=50)
    parser.set_defaults(max_steps=None, num_train_epochs=None)  # until it is known which of the two is given
    argv = _with_preset(argv, folder)
    settings = parse_flags(parser, argv)
    if not (settings.model_name_or_path or settings.dataset_name or "--config" in argv):
        argv = ["--config", f"{folder}/{embedded}", *argv]
        settings = parse_flags(parser, argv)
    if settings.algorithm is not None:
        parser.set_defaults(**algorithm(settings.algorithm))
        argv = _with_algorithm(argv, settings.algorithm)
        settings = parse_flags(parser, argv)  # values of the user win
    if not (settings.use_vllm and settings.vllm_enable_sleep_mode):  # vLLM's own allocator refuses such segments
        use_expandable_segments()
    parser.set_defaults(max_steps=500 if settings.num_train_epochs is None else -1, num_train_epochs=3.0)
    if not (settings.model_name_or_path and settings.dataset_name):
        parser.error("give both --model_name_or_path and --dataset_name, or neither of them for the embedded run")
    for name, least in (("max_eval_prompts", 1), ("eval_samples", 0)):
        if getattr(settings, name) < least:
            parser.error(f"--{name} {getattr(settings, name)} must be {least} or more")
    with _config_in_ascii(with_group_size(argv, settings, folder=folder)) as flags:
        script_args, args, model_args = parser.parse_args_and_config(flags)
    for owner, name in ((model_args, "model_name_or_path"), (script_args, "dataset_name")):
        setattr(owner, name, getattr(owner, name).replace("$RECIPES", folder))
    refuse_unread_flags(script_args, ["dataset_streaming"], "recipes load whole data sets")
    if script_args.algorithm is not None and int(os.environ.get("RANK", 0)) == 0:
        show(describe_algorithm(script_args.algorithm, args))
    return script_args, args, model_args


def _with_algorithm(argv: list[str], name: str) -> list[str]:
    """The flags, after those that `--algorithm` stands for: it overrides a file, such as a preset; other flags override
    it. An algorithm that a file names only changes defaults."""
    if not any(word.partition("=")[0] == "--algorithm" for word in argv):
        return argv
    return [*(word for key, value in algorithm(name).items() for word in (f"--{key}", str(value))), *argv]


def _with_preset(argv: list[str], folder: str) -> list[str]:
    """The flags, with the name of a preset replaced by its path: `--config gpu_8gb.yaml`, at any place.

    Raises:
        SystemExit: there is no such file.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, rest = parser.parse_known_args(argv)
    if given.config is None:
        return argv
    for path in (Path(given.config), Path(folder, given.config)):
        if path.is_file():
            return ["--config", str(path), *rest]
    presets = ", ".join(sorted(path.name for path in Path(folder).glob("*.yaml")))
    raise SystemExit(f"--config {given.config}: there is no such file. Presets of the recipes: {presets}")


def refuse_unread_flags(script_args: RecipeArguments, names: Sequence[str], reason: str) -> None:
    """Refuse flags that a recipe does not read: ignoring them would hide a mistake.

    Args:
        names: fields that this run does not read.
        reason: why not, for the message.

    Raises:
        SystemExit: the value of one of these fields is not its default.
    """
    defaults = {one.name: one.default for one in fields(script_args)}
    for name in names:
        value = getattr(script_args, name)
        if value != defaults[name]:
            raise SystemExit(f"--{name} {value} would have no effect: {reason}. Leave it out.")


@contextmanager
def _config_in_ascii(argv: list[str]) -> Iterator[list[str]]:
    """The flags, with the file of `--config` replaced by an ASCII copy: TRL reads it in the encoding of the locale."""
    flags = list(argv)
    with TemporaryDirectory() as folder:
        if "--config" in flags:
            at = flags.index("--config") + 1
            copy = Path(folder, "config.yaml")
            copy.write_text(yaml.safe_dump(read_config(flags[at])), encoding="ascii")
            flags[at] = str(copy)
        yield flags


def build_problems(
    script_args: RecipeArguments,
    args: GRPOExtConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    reads_gold: Callable[[str], bool] | None = None,
) -> Problems:
    """The problems that these arguments name; for `reads_gold`, see `data.load_problems`.

    Raises:
        SystemExit, ValueError: see `data.load_problems`.
    """
    return load_problems(
        script_args.dataset_name,
        tokenizer,
        config=script_args.dataset_config,
        train_split=script_args.dataset_train_split,
        test_split=script_args.dataset_test_split,
        max_heldout=script_args.max_eval_prompts,
        seed=args.seed,
        prompt_format=prompt_format,
        prompt_column=script_args.prompt_column,
        answer_column=script_args.answer_column,
        chat=script_args.chat,
        unreadable_gold=script_args.unreadable_gold,
        reads_gold=reads_gold,
    )


def build_trainer(
    reward: Any,
    problems: Problems,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOExtConfig,
    model_args: PolicyConfig,
    *,
    algorithm: str | None = None,
    **arguments: Any,
) -> GRPOExtTrainer:
    """The trainer for these arguments; `arguments` are further arguments of GRPOExtTrainer.

    Args:
        algorithm: the one of `--algorithm`, which may have a reward of its own.
    """
    shapes_length = algorithm is not None and ALGORITHMS[algorithm].shapes_length
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    return GRPOExtTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[reward, overlong_punishment(args.max_completion_length)] if shapes_length else reward,
        args=args,
        train_dataset=problems.train,
        processing_class=tokenizer,
        quantization_config=quantization(model_args, args),
        peft_config=get_peft_config(model_args),
        **arguments,
    )


# The run


@escaping_unencodable()
def train_and_report(
    trainer: GRPOExtTrainer,
    problems: Problems,
    reward: Any,
    *,
    recipe: str,
    eval_samples: int = 0,
    evaluate: Callable[..., Evaluation] = evaluate,
) -> dict[str, object]:
    """Train, measure held-out accuracy, and write the report.

    Args:
        trainer: must not be trained yet.
        problems: the held-out rows are evaluated and must not be among the training rows.
        reward: passed to `evaluate` to grade held-out completions: a reward function that gives 1.0 to a right one. If
            it has a lenient version (`grpo_ext.rewards.lenient`), accuracy with the format ignored is measured, too.
        recipe: name of the recipe, for the summary.
        eval_samples: completions sampled per held-out problem before and after training; 0 for greedy accuracy only.
        evaluate: `evaluation.complete.evaluate`, or a function that takes the same arguments.

    Returns:
        The contents of `summary.json`; empty if `dry_run` ended the run before its first step.

    Raises:
        Stopped: SIGINT, SIGTERM or `max_hours` ended the run (`checkpoints/stop.py`). The last line that it prints has
            the command that continues it.
    """
    with trainer.stop.on_signals(signal.SIGINT, signal.SIGTERM), _printing_resume_command(trainer):
        return _train_and_report(trainer, problems, reward, recipe=recipe, eval_samples=eval_samples, evaluate=evaluate)


@contextmanager
def _printing_resume_command(trainer: GRPOExtTrainer) -> Iterator[None]:
    """A context that prints the command that continues the run, if the run is stopped in it."""
    start, resume = resume_command(resumes=False), resume_command()  # a launcher may end first
    try:
        yield
    except Stopped as stopped:
        if trainer.accelerator.is_main_process:
            last = None if trainer.args.save_only_model else trainer.last_checkpoint
            if last is None:
                show(f"stopped by {stopped.reason}; there is no checkpoint to continue from. To start again: {start}")
            else:
                steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
                show(f"stopped by {stopped.reason} after {steps}; {last} is complete. To continue: {resume}")
        raise


def _train_and_report(
    trainer: GRPOExtTrainer,
    problems: Problems,
    reward: Any,
    *,
    recipe: str,
    eval_samples: int,
    evaluate: Callable[..., Evaluation],
) -> dict[str, object]:
    args = trainer.args
    heldout = problems.heldout.to_list()
    lenient_reward = lenient_version(reward)
    if lenient_reward is not None:
        lenient_reward = in_workers(lenient_reward, args.reward_workers, args.reward_timeout)
        evaluate = partial(evaluate, lenient_reward=lenient_reward)
    base_model = str(redact(trainer.model.config.name_or_path))
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
    show_banner(trainer, model_name=base_model, data=f"{len(problems.train)} problems; held out: {problems.note}")
    trainer.preflight()
    if args.dry_run:
        if trainer.accelerator.is_main_process:
            show("dry run: all checks passed; nothing was trained")
        return {}
    resumed = trainer.find_checkpoint(args.resume_from_checkpoint)
    before = None
    if resumed:
        before = load_initial_evaluation(args.output_dir, problems=heldout, samples=eval_samples)
    if before is None:  # the policy is still the starting policy
        with DistributedBackend(trainer.accelerator).gather_params(list(trainer.model.parameters())):
            before = measure(samples=eval_samples, description="held-out accuracy before")
        if trainer.accelerator.is_main_process:
            save_initial_evaluation(args.output_dir, before)
    during = partial(measure, samples=min(eval_samples, 1))
    record = partial(_record, trainer, heldout)
    trainer.add_callback(BestAdapter(trainer))
    trainer.add_callback(HeldoutFile())  # starts the file that the next callback appends to
    trainer.add_callback(HeldOutAccuracy(before, during, record))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.monotonic() - started
    if trainer.stop.reason is not None:
        if trainer.accelerator.is_main_process:
            draw_or_warn(write_page, args.output_dir)
            draw_or_warn(draw_curves, args.output_dir)
            show(f"report.html, curves.png and metrics.jsonl are in {args.output_dir}")
        raise Stopped(trainer.stop.reason)
    after = measure(samples=eval_samples, description="held-out accuracy after")
    record(after)
    close_workers([lenient_reward])
    summary = build_summary(trainer, recipe=recipe, base_model=base_model, seconds=seconds, before=before, after=after)

    if trainer.accelerator.is_main_process:
        write_summary(args.output_dir, summary)
        draw_or_warn(draw_curves, args.output_dir)
    trainer.save_model()  # with a card that shows both; also pushes to the Hub if push_to_hub is on
    if trainer.accelerator.is_main_process:
        _show_samples(heldout, before, after)
        show(f"adapter, report.html, curves.png, metrics.jsonl and summary.json are in {args.output_dir}")
        best = read_best(args.output_dir)
        if best and best["pass@1"] > after.greedy.value:
            show(f"the best adapter (step {best['step']}, held-out pass@1 {best['pass@1']:.2f}) is in its folder best/")
        show(accuracy_lines(summary))
    return summary


def _record(trainer: GRPOExtTrainer, heldout: list[Problem], evaluation: Evaluation) -> None:
    """Log an evaluation at the current step, and update the report."""
    trainer.log_alone(evaluation_metrics(evaluation))
    if trainer.accelerator.is_main_process:
        append_evaluation(trainer.args.output_dir, trainer.state.global_step, evaluation, heldout)
        draw_or_warn(write_page, trainer.args.output_dir)


def _show_samples(heldout: list[Problem], before: Evaluation, after: Evaluation) -> None:
    """Print the first few held-out problems with their greedy completions before and after; right ones are green."""
    table = Table(title="Held-out problems, greedy completions", title_justify="left", show_lines=True)
    for column in ("problem", "before", "after"):
        table.add_column(column, overflow="fold")
    for i, problem in enumerate(heldout[:SHOWN_PROBLEMS]):
        answers = [
            Text(text_of(e.completions[i])[:300].strip(), "green" if e.right[i] else "red")
            + Text("  (right)" if e.right[i] else "  (wrong)")
            for e in (before, after)
        ]
        table.add_row(Text(text_of(problem["prompt"])[-300:].strip()), *answers)
    show(table)
