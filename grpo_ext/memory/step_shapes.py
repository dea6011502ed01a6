"""The shapes of the three phases of a training step: sampling, the reference pass, and the update.

    phase_shapes(StepShape(prompt=512, completion=256, generations=8, rows=8))      # [PhaseShape(...), ...]

The list has one shape per phase; if `beta` is 0, there is no reference pass.
"""

from dataclasses import dataclass, replace

from grpo_ext.engine.batch import NO_GRAD_CHUNK_FACTOR


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes of one optimizer step, in the terms of `GRPOExtConfig`.

    Attributes:
        prompt: tokens of the longest prompt.
        completion: `max_completion_length`; every completion is assumed to have that many tokens.
        generations: `num_generations`.
        rows: `per_device_train_batch_size`, completions per micro-batch.
        accumulation: `gradient_accumulation_steps`, micro-batches per rollout.
        chunk_tokens, gradient_checkpointing, beta: the fields of the same name.
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
        """Maximum tokens with a graph at the same time; None for no limit. The trainer applies the same rule."""
        one_row = self.prompt + self.completion if self.gradient_checkpointing else None
        return one_row if self.chunk_tokens is None else self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class PhaseShape:
    """What the memory of a phase depends on. Phases with equal shapes are measured once.

    Attributes:
        phase: `"sampling"`, `"reference"` or `"update"`.
        prompts, rows_per_prompt: number of prompts, and of completions per prompt.
        prompt, completion: tokens of each prompt and of each completion.
        prompts_per_forward: prompts that are prefilled together.
        max_rows, chunk_tokens: see `engine.batch.ScoringBatch`.
    """

    phase: str
    prompts: int
    rows_per_prompt: int
    prompt: int
    completion: int
    prompts_per_forward: int
    max_rows: int | None = None
    chunk_tokens: int | None = None

    @property
    def rows(self) -> int:
        return self.prompts * self.rows_per_prompt


def phase_shapes(step: StepShape) -> list[PhaseShape]:
    """Sampling of a rollout, its reference pass if `beta` is not 0, and the update on one micro-batch."""
    return [_sampling(step), *([_reference(step)] if step.beta else []), _update(step)]


def _sampling(step: StepShape) -> PhaseShape:
    return _whole_phase(step, "sampling", rows=step.rows * step.accumulation)


def _reference(step: StepShape) -> PhaseShape:
    """Forwards of at most one micro-batch of rows. Only scores survive a forward, so two forwards reach the peak: the
    second one runs while the scores of the first one are held."""
    rollout = _whole_phase(step, "reference", rows=step.rows * step.accumulation)
    chunk_tokens = None if step.graph_tokens is None else step.graph_tokens * NO_GRAD_CHUNK_FACTOR
    return replace(
        rollout,
        prompts=min(rollout.prompts, 2 * rollout.prompts_per_forward),
        rows_per_prompt=min(rollout.rows_per_prompt, 2 * step.rows, _rows_of_two_chunks(step, chunk_tokens)),
        max_rows=step.rows,
        chunk_tokens=chunk_tokens,
    )


def _update(step: StepShape) -> PhaseShape:
    """The whole micro-batch at once if its graph stays within `graph_tokens`, else in chunks."""
    whole = _whole_phase(step, "update", rows=step.rows)
    tokens = whole.prompts * ((1 + whole.rows_per_prompt) * step.prompt + whole.rows_per_prompt * step.completion)
    if step.graph_tokens is None or tokens <= step.graph_tokens:  # as in `ScoringBatch.fits_one_chunk`
        return whole
    rows_per_prompt = min(whole.rows_per_prompt, _rows_of_two_chunks(step, step.graph_tokens))
    return replace(whole, rows_per_prompt=rows_per_prompt, chunk_tokens=step.graph_tokens)


def _whole_phase(step: StepShape, phase: str, rows: int) -> PhaseShape:
    return PhaseShape(
        phase=phase,
        prompts=max(1, rows // step.generations),
        rows_per_prompt=min(step.generations, rows),
        prompt=step.prompt,
        completion=step.completion,
        prompts_per_forward=max(1, step.rows // step.generations),
    )


def _rows_of_two_chunks(step: StepShape, chunk_tokens: int | None) -> int:
    """Rows in two chunks of a prompt. Two chunks have the same peak as all chunks of that prompt."""
    return step.generations if chunk_tokens is None else 2 * max(1, chunk_tokens // (step.prompt + step.completion))


def refuse_impossible_step(step: StepShape, positions: int) -> None:
    """Refuse a step that a model with this many positions cannot run.

    Raises:
        ValueError: a size is out of range; the message gives the value received and a valid one.
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
            f"prompt={step.prompt} and completion={step.completion} add up to {tokens} tokens, but the model has only "
            f"{positions} positions. Use for example {positions // 2} tokens for each."
        )
