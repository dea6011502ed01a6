"""What a training step computes, from its sizes: sampling, the pass of the reference, the update.

passes(Step(prompt=512, completion=256, generations=8, rows=8))     # three, or two with beta=0
"""

from dataclasses import dataclass, replace

from grpo_ext.engine.batch import NO_GRAD_CHUNK_FACTOR


@dataclass(frozen=True, kw_only=True)
class Step:
    """The sizes of an optimizer step, as the fields of `GRPOExtConfig` give them.

    Attributes:
        prompt: tokens of the longest prompt.
        completion: `max_completion_length`; every completion is taken to be as long.
        generations: `num_generations`.
        rows: `per_device_train_batch_size`, completions of a micro-batch.
        accumulation: `gradient_accumulation_steps`, micro-batches of a rollout.
        chunk_tokens, gradient_checkpointing, beta: as there.
    """

    prompt: int
    completion: int
    generations: int
    rows: int
    accumulation: int = 1
    chunk_tokens: int | None = None
    gradient_checkpointing: bool = True
    beta: float = 0.1

    @property
    def graph_tokens(self) -> int | None:
        """Tokens that carry a graph at once; None for no bound. `mechanisms/shared_prompt.py` decides it likewise."""
        one_row = self.prompt + self.completion if self.gradient_checkpointing else None
        return one_row if self.chunk_tokens is None else self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a phase of a step computes, as far as its memory depends on it: steps that share a pass are counted once.

    Attributes:
        phase: `"sampling"`, `"reference"` or `"update"`.
        prompts, each: so many prompts with so many rows each.
        prompt, completion: tokens.
        at_once: prompts that are read together.
        max_rows, chunk_tokens: see `engine.batch.ScoringBatch`.
    """

    phase: str
    prompts: int
    each: int
    prompt: int
    completion: int
    at_once: int
    max_rows: int | None = None
    chunk_tokens: int | None = None

    @property
    def rows(self) -> int:
        return self.prompts * self.each


def passes(step: Step) -> list[Pass]:
    """Of a rollout in sampling and under the reference, if there is one, and of a micro-batch in the update."""
    return [_sampling(step), *([_reference(step)] if step.beta else []), _update(step)]


def _sampling(step: Step) -> Pass:
    return _pass(step, "sampling", rows=step.rows * step.accumulation)


def _reference(step: Step) -> Pass:
    """Forwards of no more rows than a micro-batch has. They leave their scores alone, so two of them are enough: the
    second finds what the first one leaves."""
    rollout = _pass(step, "reference", rows=step.rows * step.accumulation)
    budget = None if step.graph_tokens is None else step.graph_tokens * NO_GRAD_CHUNK_FACTOR
    return replace(
        rollout,
        prompts=min(rollout.prompts, 2 * rollout.at_once),
        each=min(rollout.each, 2 * step.rows, _two_chunks(step, budget)),
        max_rows=step.rows,
        chunk_tokens=budget,
    )


def _update(step: Step) -> Pass:
    """With a graph of all of it, or, where it has more tokens than that may have, in chunks."""
    whole = _pass(step, "update", rows=step.rows)
    tokens = whole.prompts * ((1 + whole.each) * step.prompt + whole.each * step.completion)
    if step.graph_tokens is None or tokens <= step.graph_tokens:  # as `ScoringBatch.fits_one_chunk` counts
        return whole
    return replace(whole, each=min(whole.each, _two_chunks(step, step.graph_tokens)), chunk_tokens=step.graph_tokens)


def _pass(step: Step, phase: str, rows: int) -> Pass:
    return Pass(
        phase=phase,
        prompts=max(1, rows // step.generations),
        each=min(step.generations, rows),
        prompt=step.prompt,
        completion=step.completion,
        at_once=max(1, step.rows // step.generations),
    )


def _two_chunks(step: Step, budget: int | None) -> int:
    """Rows of two chunks of a prompt, which hold as much as all of its chunks do."""
    return step.generations if budget is None else 2 * max(1, budget // (step.prompt + step.completion))


def refuse_impossible_step(step: Step, positions: int) -> None:
    """Whether a model with so many positions can take such a step.

    Raises:
        ValueError: it cannot; the message says what was received and what is valid.
    """
    for name, least in (("prompt", 2), ("completion", 2), ("generations", 2), ("rows", 1), ("accumulation", 1)):
        if getattr(step, name) < least:
            raise ValueError(f"{name}={getattr(step, name)} must be at least {least}.")
    if step.chunk_tokens is not None and step.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={step.chunk_tokens} must be at least 1, for example 4096, or left out.")
    rollout = step.rows * step.accumulation
    if rollout % step.generations:
        raise ValueError(
            f"num_generations={step.generations} needs a rollout that is a multiple of {step.generations}, got "
            f"{rollout} (batch {step.rows} x accumulation {step.accumulation}). Use for example "
            f"per_device_train_batch_size={step.generations}."
        )
    tokens = step.prompt + step.completion
    if tokens > positions:
        raise ValueError(
            f"prompt={step.prompt} and completion={step.completion} are {tokens} tokens, and the model has "
            f"positions for {positions}. Use for example a prompt and a completion of {positions // 2}."
        )
