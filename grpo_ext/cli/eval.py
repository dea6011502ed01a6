"""`grpo-ext eval --model NAME --task gsm8k`: how many problems a model solves, with or without an adapter.

`--task` names a benchmark (`eval_tasks.py`) or a file, and `--data` a local copy of it. `--data` alone takes any
problems. Data with tests of programs is evaluated as programs, other data as mathematics. It measures as a run does:
the prompts of `grpo_ext.data`, greedy completions for pass@1, samples for pass@k, 95% intervals. From a test split, it
takes the problems that a run with the same seed held out. From data with one split, it takes rows of the whole data: a
run on this data has trained on most of them.

Two accuracies stand side by side. The strict one is that of a run: the answer has the format that the reward demands.
The lenient one ignores the format (`grpo_ext.rewards.lenient`).

{"model": "Qwen/Qwen2.5-0.5B", "pass_at_1": {"value": 0.31, "low": 0.26, "high": 0.37, "n": 256}, ...}
"""

import argparse
import inspect
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_ext.cli.data_arguments import add_data_arguments
from grpo_ext.cli.eval_tasks import TASKS, find_task
from grpo_ext.cli.load_reward import load_reward
from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_ext.config import GRPOExtConfig
    from grpo_ext.evaluation.estimates import Estimate
    from grpo_ext.model.load import PolicyConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--model", required=True, help="a Hub name or a folder")
    parser.add_argument("--adapter", help="an adapter for this model: the output folder of a run, or a Hub name")
    parser.add_argument(
        "--task",
        metavar="TASK|FILE",
        help=f"a benchmark ({', '.join(TASKS)}; --data names a local copy), or a file or folder with problems",
    )
    add_data_arguments(parser, split="test", required=False)
    parser.add_argument(
        "--chat",
        choices=["auto", "true", "false"],
        default="auto",
        help="whether prompts become chat messages, as in a run; default: %(default)s",
    )
    parser.add_argument(
        "--reward",
        help="the reward function as module:name; default: that of the task, or grpo_ext.rewards:math_answer_reward",
    )
    parser.add_argument(
        "--samples", type=int, default=0, help="samples per problem, which is the k of pass@k; default: greedy only"
    )
    parser.add_argument(
        "--save_pass_rates",
        metavar="FILE",
        help="file for the share of right samples of each problem, which start_pass_rates of a run reads; needs "
        "--samples, and usually --split train and --max_problems",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="temperature of the samples, above 0; default: %(default)s"
    )
    parser.add_argument(
        "--max_problems",
        type=int,
        help="maximum number of problems; default: all of a task, else 256, which give an interval of +-0.06 or less",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="maximum tokens per completion; default: that of the task, else 256"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="completions decoded at the same time; default: %(default)s"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json.loads,
        metavar="JSON",
        help="those of the run, for example '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--load_in_4bit", action="store_true", help="load the model in 4 bits, as a QLoRA run does")
    parser.add_argument(
        "--seed", type=int, default=42, help="seed of problems and samples; default: 42, which is the default of a run"
    )
    parser.add_argument("--json", metavar="FILE", help="file for the result; default: standard output")


def run(options: argparse.Namespace) -> None:
    """Evaluate, and write one JSON object."""
    for name, least in (("samples", 0), ("max_problems", 1), ("max_new_tokens", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be {least} or more.")
    if options.samples and options.temperature <= 0:
        raise ValueError(f"--temperature {options.temperature} must be above 0 with --samples, for example 0.8.")
    if options.save_pass_rates and options.samples < 1:
        raise ValueError("--save_pass_rates needs samples of each problem. Type --samples 8.")
    config = Path(options.model, "adapter_config.json")
    if config.exists():
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"] or "BASE"
        raise ValueError(f"'{options.model}' is an adapter. Type: --model {base} --adapter {options.model}")
    task = find_task(options.task, options.data)
    for name in ("json", "save_pass_rates"):
        _prepare_file(f"--{name}", getattr(options, name))
    quiet_libraries()
    from grpo_ext.config import GRPOExtConfig
    from grpo_ext.data import DEFAULT_FORMAT, format_rows, is_chat, load_splits, program_tests, reads_gold, sample_rows
    from grpo_ext.data.pass_rates import write_pass_rates
    from grpo_ext.data.programs import PROGRAM_FORMAT, with_supported_tests
    from grpo_ext.evaluation.complete import evaluate
    from grpo_ext.model.load import PolicyConfig, load_tokenizer
    from grpo_ext.rewards import MathAnswerReward, ProgramReward
    from grpo_ext.rewards.lenient import lenient_version
    from grpo_ext.rollout.reward_workers import close_workers, in_workers

    model_args = PolicyConfig(model_name_or_path=options.model, load_in_4bit=options.load_in_4bit)
    tokenizer = load_tokenizer(model_args)
    splits = load_splits(task.data)
    rows = splits.pick(splits.only_or(options.split), "--split")
    runs_programs = bool(program_tests(rows.column_names)) if task.runs_programs is None else task.runs_programs
    options.data = task.data
    options.reward = options.reward or f"grpo_ext.rewards:{'program_reward' if runs_programs else 'math_answer_reward'}"
    options.max_new_tokens = options.max_new_tokens or task.max_new_tokens
    options.max_problems = options.max_problems or task.max_problems or len(rows)
    plain_reward = load_reward(options.reward)
    unwrapped = inspect.unwrap(plain_reward)
    prompt_format, skipped = DEFAULT_FORMAT, ""
    if runs_programs:
        prompt_format = PROGRAM_FORMAT
        if isinstance(unwrapped, ProgramReward):
            (rows,), skipped = with_supported_tests(f"'{options.data}'", rows)
    is_math = isinstance(unwrapped, MathAnswerReward)
    rows, note = format_rows(
        rows,
        tokenizer,
        f"'{options.data}'",
        prompt_format,
        needs_answer=is_math,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        as_chat=is_chat(tokenizer, options.chat),
        unreadable_gold=options.unreadable_gold,
        reads_gold=reads_gold if is_math else None,
    )
    for text in filter(None, (splits.note, skipped, note)):
        print(text, file=sys.stderr)
    problems = sample_rows(rows, options.max_problems, options.seed).to_list()
    args = GRPOExtConfig(report_to="none")
    reward, lenient_reward = (
        in_workers(one, args.reward_workers, args.reward_timeout)
        for one in (plain_reward, lenient_version(plain_reward))
    )
    model = _load(model_args, args, options.adapter)
    started = time.monotonic()
    try:
        found = evaluate(
            model,
            tokenizer,
            problems,
            reward,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            samples=options.samples,
            batch_size=options.batch_size,
            seed=options.seed,
            description="evaluation",
            template_kwargs=options.chat_template_kwargs,
            lenient_reward=lenient_reward,
        )
    finally:
        close_workers([reward, lenient_reward])
    if options.save_pass_rates:
        prompts = [problem["prompt"] for problem in problems]
        write_pass_rates(options.save_pass_rates, prompts, found.shares, found.k)
    measured = {"pass_at_1": found.greedy, "lenient_pass_at_1": found.lenient}
    measured |= {"sampled_pass_at_1": found.sampled, "lenient_sampled_pass_at_1": found.lenient_sampled}
    measured |= {"pass_at_k": found.pass_at_k}
    result = {name: value for name, value in vars(options).items() if name not in ("json", "samples")}
    result |= {name: None if estimate is None else asdict(estimate) for name, estimate in measured.items()}
    result["pass_at_1_by_kind"] = asdict(found)["kinds"]
    result |= {"k": found.k, "seconds": round(time.monotonic() - started, 1)}
    text = json.dumps(result, indent=2)
    if options.json is None:
        show(text)
        return
    Path(options.json).write_text(text + "\n", encoding="utf-8")
    show(f"{_line(measured, found.k)}  ({len(problems)} problems; full result in {options.json})")


def _prepare_file(flag: str, file: str | None) -> None:
    """Create the folder of a result, so that a long evaluation is not lost at its end.

    Raises:
        ValueError: the file cannot be written.
    """
    if file is None:
        return
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {file}: its folder cannot be created: {error.strerror}.") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {file} cannot be written. Name a file in a folder that you can write to.")


def _load(model_args: "PolicyConfig", args: "GRPOExtConfig", adapter: str | None) -> "PreTrainedModel":
    """The model as a run loads it, frozen and in the precision of the device, with its adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from grpo_ext.model.load import disable_4bit_repacking, model_init_kwargs, quantization

    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        quantization_config=quantization(model_args, args),
        device_map={"": args.device},
        **model_init_kwargs(model_args, args),
    )
    disable_4bit_repacking(model)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def _line(measured: "dict[str, Estimate | None]", k: int) -> str:
    """`pass@1 0.14 [0.10, 0.18] (any format: 0.20 [0.16, 0.25])  pass@8 0.98 [0.95, 0.99]`"""
    labels = {"pass_at_1": "pass@1", "sampled_pass_at_1": "sampled pass@1", "pass_at_k": f"pass@{k}"}
    parts = []
    for name, label in labels.items():
        lenient = measured.get(f"lenient_{name}")
        if measured[name] is not None:
            parts.append(f"{label} {measured[name]}" + (f" (any format: {lenient})" if lenient is not None else ""))
    return "  ".join(parts)
