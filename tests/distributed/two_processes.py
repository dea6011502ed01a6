"""The training runs that test_processes.py compares: two processes run this file, and a single process imports it.

    accelerate launch --multi_gpu --num_processes 2 tests/distributed/two_processes.py FOLDER

writes FOLDER/<case>-<process>.pt for every case: the adapter and the log of that process; and the same for every case
of `two_resumed.py`.
"""

import itertools
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental

import psutil
import torch
from datasets import Dataset
from safetensors.torch import save_model
from transformers import AutoTokenizer, LlamaForCausalLM

import grpo_ext
from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.engine import install
from grpo_ext.rollout.dialogue import Dialogue, TextEnv, dialogue_reward
from tests.distributed import two_resumed
from tests.tools.lanes import THOROUGH
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import share_of_digits
from tests.tools.training import SETTINGS, adapter_of

STEPS, SIBLINGS, LONGEST = 3, 4, 12
QUESTIONS = [f"Question: {sum_}=?\nAnswer:" for sum_ in ("1+2", "30+41", "7+8", "12+30", "9+9", "500+1")]

# Rows of each of two processes, and the settings; a single process gets twice as many rows. The losses are those whose
# normaliser counts rows, or the tokens of all processes: bnpo divides by the tokens of one process, and so does TRL's
# entropy bonus, which is therefore off.
WHOLE_GROUPS, HALF_GROUPS, ONE_AND_A_HALF = 4, 2, 6
OURS: dict[str, Any] = {"loss_type": "grpo_sequence", "entropy_coef": 0.01}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ours": (WHOLE_GROUPS, OURS),
    "workers": (WHOLE_GROUPS, OURS | {"reward_workers": None}),
    "straddling": (HALF_GROUPS, OURS),
    "straddling_chunks": (HALF_GROUPS, OURS | {"chunk_tokens": 40, "ddp_find_unused_parameters": False}),
    "straddling_plain": (HALF_GROUPS, OURS | {"share_prompt": False}),
    # without an adapter, and with a reference model that accelerate wraps for mixed precision
    "whole_model": (HALF_GROUPS, OURS | {"chunk_tokens": 40, "learning_rate": 5.0}),
    "whole_model_bf16": (HALF_GROUPS, OURS | {"chunk_tokens": 40, "learning_rate": 5.0, "bf16": True}),
    # all optimizer steps on one rollout: old log-probs and clipped ratios
    "mixed_dapo": (ONE_AND_A_HALF, {"loss_type": "dapo", "chunk_tokens": 40, "num_iterations": 3}),
    "mixed_dr_grpo": (ONE_AND_A_HALF, {"loss_type": "dr_grpo", "chunk_tokens": 40}),
    # gradients of the first micro-batch are not synchronised before the second
    "accumulated": (HALF_GROUPS, OURS | {"chunk_tokens": 40, "gradient_accumulation_steps": 2}),
    "exact_kl": (ONE_AND_A_HALF, OURS | {"kl_estimator": "exact", "chunk_tokens": 40}),
    "exact_kl_grpo": (HALF_GROUPS, {"loss_type": "grpo", "kl_estimator": "exact", "gradient_accumulation_steps": 2}),
    # two of six questions have dead groups, which are replaced by groups on other questions
    "resampled_straddling": (HALF_GROUPS, OURS | {"dead_groups": "resample", "max_resample_rounds": 2}),
    # a process whose only group is dead runs no rows, but takes part in the gradient reduction; both run the worst-case
    # step before the first one, and the run is watched
    "guarded": (WHOLE_GROUPS, OURS | {"dead_groups": "skip", "beta": 0.0, "entropy_coef": 0.0, "guards": True}),
    "skipped_chunks": (WHOLE_GROUPS, {"loss_type": "dapo", "dead_groups": "skip", "beta": 0.0, "chunk_tokens": 40}),
    # both choose the same problems, which every process learns about from the answers of all
    "pools": (ONE_AND_A_HALF, OURS | {"curriculum": "pools", "dead_groups": "resample", "max_steps": 6}),
    # some groups become mixed only with more completions, which each process samples for its own groups
    "growing": (WHOLE_GROUPS, OURS | {"num_generations_max": 12}),
    # groups of earlier steps, sampled by either process, replace dead ones
    "replayed": (WHOLE_GROUPS, OURS | {"replay_fraction": 1.0, "replay_max_age": 2}),
    "replayed_straddling": (HALF_GROUPS, OURS | {"replay_fraction": 1.0, "num_iterations": 2, "max_steps": 4}),
    # a micro-batch would fit the first process, but not the second; see `memory_of`
    "scarce": (HALF_GROUPS, OURS | {"chunk_tokens": "auto"}),
    # episodes of one process may take more turns than those of the other
    "dialogue": (HALF_GROUPS, OURS | {"max_completion_length": 24}),
    # the second process has only masked tokens: it takes TRL's path while the first one shares prompts
    "one_idle": (HALF_GROUPS, OURS | {"chunk_tokens": 40, "mask_truncated_completions": True}),
}

# Each of these has the settings of other cases, or a loss that another test trains; they run with THOROUGH=1.
THOROUGH_ONLY = (
    "straddling",
    "straddling_plain",
    "whole_model",
    "mixed_dr_grpo",
    "exact_kl_grpo",
    "skipped_chunks",
    "replayed",
)
CASES = {name: case for name, case in CASES.items() if THOROUGH or name not in THOROUGH_ONLY}


def given_completions(prompts: list[str], trainer: GRPOExtTrainer) -> dict[str, Any]:
    """Completions that depend on the prompt, the position in its group and the step, not on the distribution of rows.

    Completions 0 and 1 of a group end; 2 and 3 are cut off.
    """
    tokenizer = trainer.processing_class
    digits = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isdigit()]
    others = sorted(set(range(len(tokenizer))) - set(digits) - set(tokenizer.all_special_ids))
    completions = []
    first_row = trainer.accelerator.process_index * len(prompts)
    _, times = getattr(trainer, "drawn_in", (0, 0))
    for row, prompt in enumerate(prompts, start=first_row):
        place = row % SIBLINGS
        rng = random.Random(f"{prompt} {place} {trainer.state.global_step} {times}")
        length = rng.randint(1, LONGEST - 1)
        ids = [rng.choice(digits if rng.random() < 0.3 * place else others) for _ in range(length)]
        completions.append([*ids, tokenizer.eos_token_id] if place < 2 else ids)
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


class Numbered(TextEnv):
    """Starts with its position in the group, then replies with the number of characters received so far, for one to
    three turns."""

    def __init__(self, place: int):
        self.place, self.heard, self.turns = place, "", 0

    def reset(self, row: dict[str, Any]) -> str:
        return f"{row['prompt']}{self.place}"

    def step(self, text: str) -> tuple[str, bool]:
        self.heard, self.turns = self.heard + text, self.turns + 1
        return f" {len(self.heard)} ", self.turns > self.place % 3

    def reward(self) -> float:
        return share_of_digits([self.heard])[0]


class GivenTurns(GRPOExtTrainer):
    """Samples turns of one to four characters, which the conversation so far determines."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        texts = [self.processing_class.decode(ids) for ids in prompt_ids]
        turns = []
        for text in texts:
            rng = random.Random(f"{text} {self.state.global_step}")
            turns.append("".join(rng.choice("0123abc") for _ in range(rng.randint(1, 4))))
        completion_ids = self.processing_class(turns)["input_ids"]
        return completion_ids, [[0.0] * len(ids) for ids in completion_ids]


class GivenCompletions(GRPOExtTrainer):
    """Samples the completions of `given_completions`, with the policy's log-probs; further calls in the same step give
    other completions."""

    drawn_in = (-1, 0)  # the step of the last call, and the number of calls in it before that one

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        step, times = self.drawn_in
        self.drawn_in = self.state.global_step, times + 1 if step == self.state.global_step else 0
        prompts = [self.processing_class.decode(ids) for ids in prompt_ids]
        completion_ids = given_completions(prompts, self)["completion_ids"]
        return completion_ids, [self.logps(*ids) for ids in zip(prompt_ids, completion_ids, strict=True)]

    @torch.no_grad()
    def logps(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        logits = self.model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)
        return logps.gather(1, torch.tensor(completion_ids).unsqueeze(1)).squeeze(1).tolist()


def two_dead_questions(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    scores = share_of_digits(completions)
    return [0.5 if prompt in QUESTIONS[:2] else score for prompt, score in zip(prompts, scores, strict=True)]


def rarely_good(completions: list[str], **columns: Any) -> list[float]:
    return [score if score > 0.7 else 0.0 for score in share_of_digits(completions)]


# Options that are tested with a sampler: the reward, and the metric that shows that the option had an effect.
MECHANISMS = {
    ("num_generations_max", 12): (rarely_good, "growth/alive"),
    ("replay_fraction", 1.0): (two_dead_questions, "replay/hit_rate"),
    ("dead_groups", "resample"): (two_dead_questions, "resampled_groups"),
    ("dead_groups", "skip"): (two_dead_questions, "frac_dead_groups"),
}


def memory_of(processes: int) -> Callable[[], Any]:
    """A `psutil.virtual_memory` with 64 GB of free memory in the first process of two, and nothing in others."""
    is_rich = processes == 2 and os.environ["RANK"] == "0"
    memory = psutil.virtual_memory()._replace(available=64 * 2**30 if is_rich else 0)
    return lambda: memory


def train(case: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train with SGD, at a rate that moves the adapter hundreds of times further than the tolerance of the test."""
    rows, settings = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    draws = next((mechanism for option, mechanism in MECHANISMS.items() if option in settings.items()), None)
    reward, effect = draws or (share_of_digits, "reward")
    kind, rollout_func = (GivenCompletions, None) if draws else (GRPOExtTrainer, given_completions)
    if case == "dialogue":
        here = rows * 2 // processes
        first = here * int(os.environ.get("RANK", "0"))
        places = itertools.cycle(row % SIBLINGS for row in range(first, first + here))
        kind, rollout_func = GivenTurns, Dialogue(lambda: Numbered(next(places)))
        reward, effect = dialogue_reward, "dialogue/turns"
    model, is_whole = small_llama(tokenizer), case.startswith("whole_model")
    if is_whole:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / "base")  # the model's `save_pretrained` saves in one process only
        save_model(model, str(folder / "base" / "model.safetensors"), metadata={"format": "pt"})
        model = LlamaForCausalLM.from_pretrained(folder / "base")  # TRL loads the reference from its path
    trainer = kind(
        model,
        reward_funcs=reward,
        args=GRPOExtConfig(
            **SETTINGS
            | {
                "output_dir": str(folder / "run"),
                "max_steps": STEPS,
                "num_generations": SIBLINGS,
                "per_device_train_batch_size": rows * 2 // processes,
                "max_completion_length": LONGEST,
                "learning_rate": 0.5,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "entropy_coef": 0.0,
                "reward_workers": 0,
                "guards": False,
                "chunk_tokens": None,
            }
            | settings
        ),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
        processing_class=tokenizer,
        peft_config=None if is_whole else random_lora(),
        rollout_func=rollout_func,
    )
    assert trainer.accelerator.num_processes == processes
    start = adapter_of(trainer)
    with (
        patch.object(install, "loss_in_chunks", wraps=install.loss_in_chunks) as chunked,
        patch.object(psutil, "virtual_memory", memory_of(processes) if case == "scarce" else psutil.virtual_memory),
    ):
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "start": start,
        "adapter": adapter_of(trainer),
        "shares": trainer.shares_prompts,
        "updates_in_chunks": sum(not call.args[1].fits_one_chunk() for call in chunked.call_args_list),
        "grad_norm": [row["grad_norm"] for row in logs],
        # logged by the steps that began with a rollout
        **{name: [row[name] for row in logs if name in row] for name in ("reward", "reward_std")},
        "effect": [row[effect] for row in logs if effect in row],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    assert Path(grpo_ext.__file__).parent.parent == Path(__file__).resolve().parents[2], grpo_ext.__file__
    process = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(train(case, 2, folder / str(process)), folder / f"{case}-{process}.pt")
    two_resumed.train_all(folder / "resumed", process)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
