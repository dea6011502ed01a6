"""Does it learn, and how fast: held-out curves of the embedded model under different settings.

    make study                                                                    # seven arms, three seeds
    python -m grpo_ext.recipes.tiny_math.study --arms sequence,stock --seeds 1    # two arms, one seed
    make study ARGS="--task mixed"                      # difficulty pools, on problems of which most are impossible
    make study ARGS="--task sweep"                      # five ranks (one of them full) x five learning rates, two seeds

An arm is `make math` with other flags: the same model, problems, batches and seeds. The task `mixed` trains on the
problems of `mixed.py`, and measures on the same held-out problems, which are of the kind that the model can learn.
Every few steps, each held-out problem is answered once at the training temperature. When a run is complete, its points
are appended to `curves.jsonl` in the output folder, one per line. Runs found there are not repeated, so an interrupted
study can be continued. At the end there is a picture, `study.png`, `mixed.png` or `sweep.png`, and a table in Markdown.

    {"arm": "sequence", "seed": 0, "steps": 35, "problems": 256, "step": 10, "answers": 256, "right": 247}
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer, get_peft_config

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.data import load_problems
from grpo_ext.data.pass_rates import write_pass_rates
from grpo_ext.model.load import load_tokenizer, model_init_kwargs
from grpo_ext.evaluation.complete import complete, evaluate, grade
from grpo_ext.report.run_reader import read_metrics
from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show
from grpo_ext.recipes.math import parse
from grpo_ext.recipes.tiny_math.mixed import mixed_problems
from grpo_ext.recipes.tiny_math.study_report import RANKS, RATES, Points, draw, sweep_table, table
from grpo_ext.rewards import math_answer_reward
from grpo_ext.rollout.pools import mixed_probability

EVERY = {"sums": 2, "mixed": 4, "sweep": 2}  # steps between two points of a curve

# The flags that an arm adds to `make math`. Stock TRL's trainer gets exactly the settings of `token`. Dead groups can
# be skipped only if neither a KL penalty nor an entropy bonus gives them a gradient.
TOKEN_LEVEL = "--loss_type grpo --scale_rewards group"
REWARD_ALONE = "--beta 0 --entropy_coef 0"
SUMS = {
    "sequence": "",
    "token": TOKEN_LEVEL,
    "stock": TOKEN_LEVEL,
    "exact": "--kl_estimator exact",
    "keep": f"{REWARD_ALONE} --dead_groups keep",
    "skip": f"{REWARD_ALONE} --dead_groups skip",
    "resample": f"{REWARD_ALONE} --dead_groups resample",
}
# Rollouts of 8 prompts, and a learning rate at which the curves rise over more than one pass over the data. The arms
# differ in the curriculum and in the share of the training problems that the model can learn: a quarter, or a sixteenth
# ("rare"). "worth" weighs a problem by the probability of a mixed group instead of p(1-p). "started" has start values
# from 8 samples per problem, which count as rollouts.
SLOWLY = f"{REWARD_ALONE} --dead_groups skip --gradient_accumulation_steps 1 --learning_rate 2e-4"
SLOWLY += " --lr_scheduler_type constant"
WITH_POOLS = f"{SLOWLY} --curriculum pools"
CURRICULA = {"off": SLOWLY, "pools": WITH_POOLS, "pools_worth": WITH_POOLS, "pools_started": WITH_POOLS}
MIXED = CURRICULA | {f"rare_{arm}": flags for arm, flags in CURRICULA.items()}
MIXED_PROBLEMS = 160
# The rate is constant, so that the steps to a goal do not depend on the length of a run. alpha is 32 for every rank, as
# in `make math`: the adapter's output is scaled by 32/r. Without guards, a run at too high a rate ends like the others.
COMPARED = f"{REWARD_ALONE} --dead_groups skip --lr_scheduler_type constant --guards false"
SWEEP = {
    f"{rank}_{rate}": f"{COMPARED} --learning_rate {rate} "
    + ("--use_peft false" if rank == "full" else f"--lora_r {rank.removeprefix('r')}")
    for rank in RANKS
    for rate in RATES
}
TASKS = {"sums": SUMS, "mixed": MIXED, "sweep": SWEEP}
ARMS = SUMS | MIXED | SWEEP
STEPS = {"sums": 35, "mixed": 120, "sweep": 35}
SEEDS = {"sums": 3, "mixed": 3, "sweep": 2}


class Curve(TrainerCallback):
    """Measures before the first step, every few steps and after the last one, and advances the progress bar."""

    def __init__(self, trainer: GRPOTrainer, heldout: list[dict[str, Any]], every: int, bar: tqdm):
        self._trainer, self._heldout, self._every, self._bar = trainer, heldout, every, bar
        self.points: Points = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update()
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        point = {"step": state.global_step, "answers": len(self._heldout), "right": self._right()}
        if state.global_step in (0, state.max_steps):
            point["right_greedy"] = self._right(temperature=0.0)
        self.points.append(point)
        self._bar.set_postfix(right=f"{point['right'] / point['answers']:.2f}")

    def _right(self, temperature: float | None = None) -> int:
        """How many held-out problems are solved by one answer each, sampled with the seed of the run; 0 is greedy."""
        args = self._trainer.args
        completions = complete(
            self._trainer.model,
            self._trainer.processing_class,
            [problem["prompt"] for problem in self._heldout],
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature if temperature is None else temperature,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        return sum(grade(math_answer_reward, self._heldout, completions))


def train(arm: str, seed: int, options: argparse.Namespace, bar: tqdm, folder: str) -> Points:
    """The curve of one run; its last point has the mean of TRL's seconds per step, which exclude the measurements."""
    flags = f"{ARMS[arm]} --seed {seed} --max_steps {options.steps}"
    task = next(task for task, arms in TASKS.items() if arm in arms)
    if arm.endswith("started"):
        flags += f" --start_pass_rates {Path(folder, 'pass_rates.jsonl')}"
    leaves_nothing = ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--output_dir", folder]
    script_args, args, model_args = parse([*flags.split(), *leaves_nothing])
    tokenizer = load_tokenizer(model_args)
    problems = load_problems(script_args.dataset_name, tokenizer, max_heldout=options.problems, seed=seed)
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    rows = problems.train
    if task == "mixed":
        rows = mixed_problems(MIXED_PROBLEMS, seed, learnable=1 / 16 if arm.startswith("rare") else 1 / 4)
    if arm.endswith("started"):
        _measure_pass_rates(rows, args, str(model_args.model_name_or_path), tokenizer)
    trainer = (GRPOTrainer if arm == "stock" else GRPOExtTrainer)(
        model=model_args.model_name_or_path,
        reward_funcs=math_answer_reward,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    if arm.endswith("worth"):
        assert trainer.parts.pools is not None
        trainer.parts.pools.worth = mixed_probability
    curve = Curve(trainer, problems.heldout.to_list(), EVERY[task], bar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    trainer.train()
    seconds = [row["step_time"] for row in trainer.state.log_history if "step_time" in row]
    curve.points[-1]["seconds_per_step"] = sum(seconds) / len(seconds)
    groups = args.generation_batch_size // args.num_generations
    run = {"arm": arm, "seed": seed, "steps": options.steps, "problems": options.problems}
    before = len(rows) // groups if arm.endswith("started") else 0  # each step has one rollout
    return [run | point | {"step": before + point["step"]} for point in curve.points]


def _measure_pass_rates(rows: Dataset, args: GRPOExtConfig, model: str, tokenizer: Any) -> None:
    """Write the file that `grpo-ext eval --samples 8 --save_pass_rates` writes, to the place where the run reads it."""
    found = evaluate(
        AutoModelForCausalLM.from_pretrained(model),
        tokenizer,
        rows.to_list(),
        math_answer_reward,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        samples=args.num_generations,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )
    write_pass_rates(str(args.start_pass_rates), rows["prompt"], found.shares, found.k)


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    options.arms = options.arms or list(TASKS[options.task])
    options.steps = options.steps or STEPS[options.task]
    options.seeds = options.seeds or SEEDS[options.task]
    quiet_libraries()
    disable_progress_bar()
    path = Path(options.output, "curves.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]

    def points() -> Points:
        """The points of the requested runs that are complete."""
        asked = {"steps": options.steps, "problems": options.problems}
        rows = [row for row in read_metrics(path) if asked.items() <= row.items()]
        return [row for row in rows if (row["arm"], row["seed"]) in wanted]

    finished = {(row["arm"], row["seed"]) for row in points()}
    left = [run for run in wanted if run not in finished]
    with tqdm(total=len(left) * options.steps, unit="step") as bar, TemporaryDirectory() as folder:
        for arm, seed in left:
            bar.set_description(f"{arm}, seed {seed}")
            curve = train(arm, seed, options, bar, folder)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(point) + "\n" for point in curve))
    picture = draw(points(), Path(options.output, "study.png" if options.task == "sums" else f"{options.task}.png"))
    show((sweep_table if options.task == "sweep" else table)(points()))
    show(f"\nall points are in {path}, the curves in {picture}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="sums", help="set of arms; default: %(default)s")
    parser.add_argument("--arms", type=_arms, help="arms, such as sequence,stock; default: all of the task")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, ... of each arm; default: 3, or 2 for the task sweep")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; default: 35, or 120 for the task mixed")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems, at most 512; default: 256")
    parser.add_argument("--output", default="outputs/study", help="folder; default: outputs/study")
    return parser


def _arms(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ARMS:
            raise argparse.ArgumentTypeError(f"there is no arm {name!r}; valid: {', '.join(ARMS)}")
    return names


if __name__ == "__main__":
    main()
