"""Multi-turn text environments: the model and the environment take turns until the episode ends.

    class Guess(TextEnv):
        def reset(self, row):
            self.secret, self.is_right = row["secret"], False
            return "Guess a number from 1 to 100."

        def step(self, text):
            guess = int(text)
            self.is_right = guess == self.secret
            return "higher" if guess < self.secret else "lower", self.is_right

        def reward(self):
            return float(self.is_right)

    GRPOExtTrainer(..., rollout_func=Dialogue(Guess, max_turns=7), reward_funcs=dialogue_reward)

Each prompt is played in one copy of the environment per completion of its group, and all episodes advance together. The
prompt is the environment's first observation, and the completion is everything after it. The loss covers only the
model's own tokens; the environment's tokens are context.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from grpo_ext.engine.decode import SampledCompletions
from grpo_ext.rewards.workers.pool import FAILURE_WINDOW, MAX_FAILURE_RATE, MIN_FAILURES, callable_name
from grpo_ext.rollout.chat_turns import Messages, TurnTokenizer

# Samples one turn per row, from the token ids so far and the maximum number of new tokens.
SampleTurns = Callable[[list[list[int]], list[int]], SampledCompletions]


class TextEnv(ABC):
    """The environment that the model talks to. One object plays one episode, in the training process.

    An exception ends only its own episode, which gets no reward and is excluded from its group. If more than 5% of
    episodes fail, the run stops.
    """

    def reset(self, row: dict[str, Any]) -> str | Messages:
        """Start an episode from a row of the dataset.

        If all copies of a row return the same observation, it is prefilled once for the group. Random choices should
        therefore come from the row.

        Returns:
            The first observation: a text or, for a chat model, messages. By default, the row's `prompt`.
        """
        return row["prompt"]

    @abstractmethod
    def step(self, text: str) -> tuple[str | None, bool]:
        """React to a turn of the model, which may be any text.

        Returns:
            The reply, and whether the episode is over. The reply that ends an episode is not used and may be None.
        """

    @abstractmethod
    def reward(self) -> float:
        """The reward of the episode, however it ended; NaN if it cannot be scored."""


@dataclass(kw_only=True)
class Episode:
    """One copy of an environment and its dialogue so far.

    Attributes:
        env: the environment.
        prompt_ids: tokens of its first observation.
        completion_ids: tokens of everything after that.
        is_own: for each completion token, 1 if the model sampled it, 0 if it comes from the environment.
        logps: for each completion token, its log-prob at sampling (nats); 0 if it comes from the environment.
        turns: number of turns of the model.
        is_over: whether the episode has ended.
        is_cut: whether the model's last turn was ended by the limit on tokens.
        reward: reward of the episode; None until it has ended, or if the environment raised.
        error: the exception that the environment raised, if any.
    """

    env: TextEnv
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    is_own: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turns: int = 0
    is_over: bool = False
    is_cut: bool = False
    reward: float | None = None
    error: Exception | None = None

    def add(self, ids: list[int], logps: list[float], *, is_own: bool) -> None:
        """Append tokens to the completion."""
        self.completion_ids += ids
        self.logps += logps
        self.is_own += [int(is_own)] * len(ids)

    @contextmanager
    def catching_env_errors(self) -> Iterator[None]:
        """A context in which an exception ends only this episode."""
        try:
            yield
        except Exception as error:  # the environment is user code and may raise anything
            self.error, self.is_over = error, True


class Dialogue:
    """A `rollout_func` for `GRPOExtTrainer` that plays a `TextEnv`. Use it with the reward function `dialogue_reward`.

    Args:
        env: creates an environment, for example its class.
        max_turns: maximum turns of the model per episode, at least 1.
        max_turn_tokens: maximum tokens per turn, at least 1; None for no limit other than that of the episode, which is
            `GRPOExtConfig.max_completion_length` for both sides together. Recommended: twice the length of a good turn,
            so that one runaway turn cannot use up the episode.

    Raises:
        ValueError: a limit is below 1.
    """

    def __init__(self, env: Callable[[], TextEnv], *, max_turns: int = 8, max_turn_tokens: int | None = None):
        for name, value in (("max_turns", max_turns), ("max_turn_tokens", max_turn_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, for example 8 turns of 256 tokens.")
        self.max_turns, self.max_turn_tokens = max_turns, max_turn_tokens
        self._env = env
        self._has_failed: deque[bool] = deque(maxlen=FAILURE_WINDOW)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """TRL calls this with the prompts of this process; the trainer has the dataset rows of these prompts."""
        if not hasattr(trainer, "play"):
            raise TypeError(
                f"Dialogue needs GRPOExtTrainer, got {type(trainer).__name__}. Use grpo_ext.GRPOExtTrainer."
            )
        return trainer.play(self)

    def play(
        self,
        rows: Sequence[dict[str, Any]],
        turns: TurnTokenizer,
        sample_turns: SampleTurns,
        *,
        max_tokens: int,
        eos_token_id: int,
    ) -> list[Episode]:
        """Play one episode per row. All unfinished episodes advance together, one sampling call per turn.

        Args:
            max_tokens: maximum tokens of an episode after its first observation. A reply that leaves no room for a
                further turn is dropped, and the episode ends.
            eos_token_id: the only token of prompt and completion if the environment fails to start.

        Raises:
            RuntimeError: the environment raised in more than 5% of the last 1,000 episodes, and more than five times.
        """
        episodes = [Episode(env=self._env()) for _ in rows]
        for episode, row in zip(episodes, rows, strict=True):
            with episode.catching_env_errors():
                episode.prompt_ids = turns.encode_first(episode.env.reset(dict(row)))
                if not episode.prompt_ids:
                    raise ValueError("reset must return a text of at least one token")
            if not episode.prompt_ids:
                episode.prompt_ids, episode.is_over = [eos_token_id], True
                episode.add([eos_token_id], [0.0], is_own=False)
        while active := [episode for episode in episodes if not episode.is_over]:
            left = [max_tokens - len(episode.completion_ids) for episode in active]
            limits = [min(tokens, self.max_turn_tokens or tokens) for tokens in left]
            sampled = sample_turns([episode.prompt_ids + episode.completion_ids for episode in active], limits)
            for i, episode in enumerate(active):
                episode.is_cut = sampled.is_cut[i]
                episode.add(sampled.tokens[i], sampled.logps[i], is_own=True)
                self._reply(episode, turns, sampled.tokens[i], max_tokens)
        for episode in episodes:
            if episode.error is None:
                with episode.catching_env_errors():
                    episode.reward = float(episode.env.reward())
        self._stop_on_many_failures(episodes)
        return episodes

    def _reply(self, episode: Episode, turns: TurnTokenizer, tokens: list[int], max_tokens: int) -> None:
        """Pass a turn of the model to the environment, and append the reply unless the episode ends."""
        episode.turns += 1
        with episode.catching_env_errors():
            reply, episode.is_over = episode.env.step(turns.decode(tokens))
            episode.is_over |= episode.turns == self.max_turns
            if episode.is_over:
                return
            if not isinstance(reply, str):
                raise TypeError(f"step must return a text unless the episode is over, got {reply!r}")
            ids = turns.encode_reply(reply, tokens[-1])
            episode.is_over = len(episode.completion_ids) + len(ids) >= max_tokens
            if not episode.is_over:
                episode.add(ids, [0.0] * len(ids), is_own=False)

    def _stop_on_many_failures(self, episodes: list[Episode]) -> None:
        errors = [episode.error for episode in episodes if episode.error is not None]
        self._has_failed.extend(episode.error is not None for episode in episodes)
        failed, played = sum(self._has_failed), len(self._has_failed)
        if errors and failed > max(MIN_FAILURES, MAX_FAILURE_RATE * played):
            raise RuntimeError(
                f"{callable_name(self._env)} raised exceptions in {failed} of the last {played} episodes, the latest "
                f"being {errors[-1]!r}. The run would learn from noise. Fix the environment."
            ) from errors[-1]


def dialogue_reward(completions: list[Any], episode_reward: list[float | None], **columns: Any) -> list[float | None]:
    """The reward of each episode; None if its environment raised, which excludes the episode from its group.

    Args:
        completions: unused.
        episode_reward: a column that `Dialogue` adds.
        columns: the other columns, unused.
    """
    return episode_reward


vars(dialogue_reward)["runs_in_process"] = True  # see `grpo_ext.rewards.workers.pool`
