"""Held-out success in a text environment: play episodes without training.

In: a model, rows of the data set and a `Dialogue`. Out: an `Evaluation`, as for problems with a single answer. An
episode is right if its environment gives a reward of 1.0 or more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_ext.console.terminal import bar
from grpo_ext.engine.decode import GroupSampler, SampledCompletions
from grpo_ext.engine.install import shared_sampling, stop_strings_of
from grpo_ext.evaluation.complete import (
    Evaluation,
    Problem,
    build_evaluation,
    evaluation_mode,
    plain_generation_config,
    why_prompts_unshared,
)
from grpo_ext.model.unwrap import base_of
from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.dialogue import Dialogue, SampleTurns


def evaluate_dialogue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    dialogue: Dialogue,
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    description: str | None = None,
    stop_strings: Sequence[str] = (),
    template_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """Success of greedy play; with `samples` >= 1 also of sampled play, with `samples` >= 2 also pass@k.

    Args:
        problems: rows for `TextEnv.reset`; at least one.
        dialogue: the environment and its limits.
        max_new_tokens: maximum tokens of an episode after its opening prompt.
        temperature: temperature of the samples, above 0.
        samples: number of sampled episodes per problem.
        batch_size: episodes played at the same time on each process.
        seed: seed of the sampling; the caller's random state is restored.
        description: label of the progress bar; None for no bar.
        stop_strings: strings that end a turn of the model, in addition to the end-of-sequence token; if empty, those of
            the model's generation config.
        template_kwargs: additional arguments of the chat template.

    Raises:
        ValueError: the model cannot continue from the KV cache of a turn.
    """
    state = PartialState()

    def play(rows: Sequence[Problem], temperature: float) -> list[tuple[str, bool]]:
        """For each episode, the text after its opening prompt, and whether it is right."""
        config = plain_generation_config(model, tokenizer, max_new_tokens, temperature)
        turns = TurnTokenizer(tokenizer, config.eos_token_id, **(template_kwargs or {}))
        played: list[tuple[str, bool]] = []
        silent = description is None or not state.is_main_process
        with (
            state.split_between_processes(list(rows)) as mine,
            evaluation_mode(model, seed + state.process_index),
            _sampling(model, tokenizer, config, list(stop_strings)) as draw,
        ):
            for start in bar(range(0, len(mine), batch_size), description, disable=silent):
                batch = mine[start : start + batch_size]
                eos: int = tokenizer.eos_token_id
                episodes = dialogue.play(batch, turns, draw, max_tokens=max_new_tokens, eos_token_id=eos)
                played += [(turns.decode(e.completion_ids), (e.reward or 0.0) >= 1.0) for e in episodes]
        return gather_object(played) if state.num_processes > 1 else played

    greedy = play(problems, 0.0)
    drawn = play([row for row in problems for _ in range(samples)], temperature) if samples else []
    return build_evaluation(
        problems, [text for text, _ in greedy], [right for _, right in greedy], [right for _, right in drawn]
    )


@contextmanager
def _sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, stop_strings: list[str]
) -> Iterator[SampleTurns]:
    reason = why_prompts_unshared(model, config)
    if reason is not None:
        raise ValueError(
            f"Dialogue continues each turn from the KV cache of the turn before, which this model or its settings do "
            f"not allow: {reason}. Evaluate another model, or change that setting."
        )
    lm, sampler = base_of(model), GroupSampler(config.temperature)
    stop_strings = stop_strings or stop_strings_of(lm.generation_config)

    def draw(histories: list[list[int]], limits: list[int]) -> SampledCompletions:
        sampler.max_new_tokens_per_row = limits
        inputs = tokenizer.pad({"input_ids": histories}, padding_side="left", return_tensors="pt").to(model.device)
        lm.generate(**inputs, generation_config=config)
        assert sampler.completions is not None
        return sampler.completions

    with sampler.keep_row_caches(), shared_sampling(lm, sampler, stop_strings, tokenizer):
        yield draw
