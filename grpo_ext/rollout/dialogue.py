"""Text environments of several turns: the model speaks, the environment answers, until one of them ends it.

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

A prompt is played in as many copies of the environment as its group has answers, all of them in step. A completion is
everything after the first words of the environment; of its tokens the model's own are trained, the environment's are
read and have no part in the loss.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from grpo_ext.engine.decode import SampledCompletions
from grpo_ext.rollout.chat_turns import Messages, Turns
from rewards.workers.pool import FAILURE_WINDOW, MAX_FAILURE_RATE, MIN_FAILURES, callable_name

# Draws one turn each of some rows: their token ids so far, and how many more they may have -> what was drawn.
Draw = Callable[[list[list[int]], list[int]], SampledCompletions]


class TextEnv(ABC):
    """What the model talks to. One object plays one episode, in the process of the training.

    An exception costs its own episode, which is left out of its group; above 5% of them the run stops.
    """

    def reset(self, row: dict[str, Any]) -> str | Messages:
        """Begin with a row of the data set; what the model reads first. Where all copies of a row begin with the same
        words, the model reads them once, so what is drawn at random should come from the row.

        Returns:
            A text or, for a chat model, messages. Unless overridden, the row's `prompt`.
        """
        return row["prompt"]

    @abstractmethod
    def step(self, text: str) -> tuple[str | None, bool]:
        """Hear the model's turn, whatever it says.

        Returns:
            The answer, and whether the episode is over; the last answer is not read by anyone and may be None.
        """

    @abstractmethod
    def reward(self) -> float:
        """What the episode was worth, however it ended. NaN says that it cannot be judged."""


@dataclass(kw_only=True)
class Episode:
    """One copy of an environment and what was said.

    Attributes:
        env: the environment.
        prompt_ids: tokens of its first words.
        completion_ids: tokens of everything after them.
        is_own: 1 for each of these that the model drew, 0 for the environment's.
        logps: log-probs that the model's tokens were drawn with (nats), 0 for the environment's.
        turns: of the model.
        is_over: whether nobody speaks any more.
        is_cut: whether the model's last turn ended because no more tokens were allowed.
        reward: of the environment; None where it raised.
        error: what it raised.
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
        """Tokens that were said."""
        self.completion_ids += ids
        self.logps += logps
        self.is_own += [int(is_own)] * len(ids)

    @contextmanager
    def at_its_own_risk(self) -> Iterator[None]:
        """What the environment raises ends this episode, and no other."""
        try:
            yield
        except Exception as error:  # it is the user's, and may raise anything
            self.error, self.is_over = error, True


class Dialogue:
    """TRL's `rollout_func` for a `TextEnv`, played by `GRPOExtTrainer`; `dialogue_reward` hands on its rewards.

    Args:
        env: makes a new environment, for example its class.
        max_turns: of the model, 1 or more. An episode that has had them is over.
        max_turn_tokens: tokens of one turn, 1 or more; None for no bound but that of the episode, which is
            `GRPOExtConfig.max_completion_length` for both sides together. Recommended: twice what a good turn takes, so
            that a turn that goes astray does not use the episode up.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, env: Callable[[], TextEnv], *, max_turns: int = 8, max_turn_tokens: int | None = None):
        for name, value in (("max_turns", max_turns), ("max_turn_tokens", max_turn_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, for example 8 turns of 256 tokens.")
        self.max_turns, self.max_turn_tokens = max_turns, max_turn_tokens
        self._env = env
        self._has_failed: deque[bool] = deque(maxlen=FAILURE_WINDOW)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """What TRL calls with the prompts of this process; the trainer knows the rows that they belong to."""
        if not hasattr(trainer, "play"):
            raise TypeError(
                f"Dialogue is played by GRPOExtTrainer, got {type(trainer).__name__}. Use grpo_ext.GRPOExtTrainer."
            )
        return trainer.play(self)

    def play(
        self, rows: Sequence[dict[str, Any]], turns: Turns, draw: Draw, *, max_tokens: int, eos_token_id: int
    ) -> list[Episode]:
        """Play each row once, all of them in step: those that go on have their next turn drawn together.

        Args:
            max_tokens: of an episode after its first words; an answer that leaves no room for a turn is not given.
            eos_token_id: stands for the words of an environment that could not begin.

        Raises:
            RuntimeError: the environment raised in more than 5% of the last 1,000 episodes, and in more than five.
        """
        episodes = [Episode(env=self._env()) for _ in rows]
        for episode, row in zip(episodes, rows, strict=True):
            with episode.at_its_own_risk():
                episode.prompt_ids = turns.opening(episode.env.reset(dict(row)))
                if not episode.prompt_ids:
                    raise ValueError("reset must return at least a word")
            if not episode.prompt_ids:
                episode.prompt_ids, episode.is_over = [eos_token_id], True
                episode.add([eos_token_id], [0.0], is_own=False)
        while going_on := [episode for episode in episodes if not episode.is_over]:
            left = [max_tokens - len(episode.completion_ids) for episode in going_on]
            limits = [min(tokens, self.max_turn_tokens or tokens) for tokens in left]
            drawn = draw([episode.prompt_ids + episode.completion_ids for episode in going_on], limits)
            for i, episode in enumerate(going_on):
                episode.is_cut = drawn.is_cut[i]
                episode.add(drawn.tokens[i], drawn.logps[i], is_own=True)
                self._answer(episode, turns, drawn.tokens[i], max_tokens)
        for episode in episodes:
            if episode.error is None:
                with episode.at_its_own_risk():
                    episode.reward = float(episode.env.reward())
        self._stop_where_too_many_failed(episodes)
        return episodes

    def _answer(self, episode: Episode, turns: Turns, tokens: list[int], max_tokens: int) -> None:
        """What the environment says to a turn of the model, where the episode goes on."""
        episode.turns += 1
        with episode.at_its_own_risk():
            answer, episode.is_over = episode.env.step(turns.text(tokens))
            episode.is_over |= episode.turns == self.max_turns
            if episode.is_over:
                return
            if not isinstance(answer, str):
                raise TypeError(f"step must return a text where the episode goes on, got {answer!r}")
            ids = turns.reply(answer, tokens[-1])
            episode.is_over = len(episode.completion_ids) + len(ids) >= max_tokens
            if not episode.is_over:
                episode.add(ids, [0.0] * len(ids), is_own=False)

    def _stop_where_too_many_failed(self, episodes: list[Episode]) -> None:
        errors = [episode.error for episode in episodes if episode.error is not None]
        self._has_failed.extend(episode.error is not None for episode in episodes)
        failed, played = sum(self._has_failed), len(self._has_failed)
        if errors and failed > max(MIN_FAILURES, MAX_FAILURE_RATE * played):
            raise RuntimeError(
                f"{callable_name(self._env)} raised {errors[-1]!r}, and so or similarly in {failed} of the last "
                f"{played} episodes. A run would learn from noise: mend the environment."
            ) from errors[-1]


def dialogue_reward(completions: list[Any], episode_reward: list[float | None], **columns: Any) -> list[float | None]:
    """The reward of each episode's own environment; None, which leaves it out of its group, where that raised.

    Args:
        completions: the episodes, of which nothing else is judged.
        episode_reward: a column that `Dialogue` adds.
        columns: the other columns, unused.
    """
    return episode_reward


vars(dialogue_reward)["runs_in_process"] = True  # see `rewards.workers.pool`
