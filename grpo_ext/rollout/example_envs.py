"""Two example environments: a calculator that the model uses in the middle of an answer, and a guessing game.

    Question: 538+478=?
    Answer: 8+8+0=[16] 3+7+1=[11] 5+4+1=[10] #### 1016

Brackets mark the calculator's replies; they are not part of the text.
"""

import re
from typing import Any

from grpo_ext.rewards import math_answer_reward
from grpo_ext.rollout.chat_turns import Messages
from grpo_ext.rollout.dialogue import TextEnv


class Calculator(TextEnv):
    """Replies with the result to a turn that ends with a sum, such as "8+8+0=". Any other turn ends the episode.

    For a base model with `stop_strings: ["="]`: its turn ends at the "=", and the result continues the same line.
    Columns: `prompt` and `answer`. The reward is 1.0 if the whole text gives the right answer, else 0.0.
    """

    def reset(self, row: dict[str, Any]) -> str | Messages:
        self.gold, self.transcript = row["answer"], ""
        return row["prompt"]

    def step(self, text: str) -> tuple[str | None, bool]:
        self.transcript += text
        sum_at_end = re.search(r"(\d{1,9}(?:\+\d{1,9}){1,9})=$", text)
        if sum_at_end is None:
            return None, True
        result = str(sum(map(int, sum_at_end[1].split("+"))))
        self.transcript += result
        return result, False

    def reward(self) -> float:
        (score,) = math_answer_reward([self.transcript], [self.gold])
        return score or 0.0


class GuessNumber(TextEnv):
    """Holds a number from 1 to 100. The model guesses, and is told whether the number is higher or lower.

    For a chat model. Column: `answer`, the number. The reward is 1.0 for a right guess; bisection needs up to 7 turns.
    """

    rules = "I think of a whole number from 1 to 100. Guess it: answer with a number, and I say higher or lower."

    def reset(self, row: dict[str, Any]) -> str | Messages:
        self.secret, self.is_guessed = int(row["answer"]), False
        return self.rules

    def step(self, text: str) -> tuple[str | None, bool]:
        guesses = re.findall(r"\d{1,9}", text)
        if not guesses:
            return "That is not a number. Answer with a number from 1 to 100.", False
        guess = int(guesses[-1])
        self.is_guessed = guess == self.secret
        return "It is higher." if guess < self.secret else "It is lower.", self.is_guessed

    def reward(self) -> float:
        return float(self.is_guessed)
