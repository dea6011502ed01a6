"""What `grpo-ext eval --task NAME` measures: data, prompts and reward of a benchmark, or of a file.

    find_task("gsm8k")          ->  GSM8K of the Hub, math rewards
    find_task("problems.csv")   ->  this file; rewards and prompts are chosen once its columns are known

The prompts are those of the recipes, so a task measures what a run on its training split trains.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        data: a data set of the Hub, a file or a folder.
        runs_programs: whether completions are programs; None if the columns decide.
        max_new_tokens: tokens per completion unless the user sets them.
        max_problems: number of problems unless the user sets it; None for all.
    """

    data: str
    runs_programs: bool | None = None
    max_new_tokens: int = 256
    max_problems: int | None = None


TASKS = {
    "gsm8k": Task(data="openai/gsm8k", runs_programs=False, max_new_tokens=512),
    "math500": Task(data="HuggingFaceH4/MATH-500", runs_programs=False, max_new_tokens=1024),
    "humaneval": Task(data="openai/openai_humaneval", runs_programs=True, max_new_tokens=512),
    "mbpp": Task(data="google-research-datasets/mbpp", runs_programs=True, max_new_tokens=512),
}


def find_task(name: str | None, data: str | None) -> Task:
    """The task of `--task` and `--data`.

    Args:
        name: a benchmark, or a file or folder of the user's; None for `data` alone.
        data: a local copy of the benchmark; None for its place on the Hub.

    Raises:
        ValueError: neither is given, or both name data.
    """
    if name is None and data is None:
        raise ValueError(f"which problems? Type --data FILE, or --task with one of: {', '.join(TASKS)}.")
    if name in TASKS:
        task = TASKS[name]
        return task if data is None else Task(**{**vars(task), "data": data})
    if name is not None and data is not None:
        raise ValueError(f"--task {name} is no benchmark ({', '.join(TASKS)}), and --data {data} is given as well.")
    if name is None:
        assert data is not None
        return Task(data=data, max_problems=256)
    return Task(data=name)
