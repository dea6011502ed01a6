"""Two environments to start from: a calculator that is asked in the middle of an answer, and a number to be guessed.

Question: 538+478=?
Answer: 8+8+0=[16] 3+7+1=[11] 5+4+1=[10] #### 1016          in brackets what the calculator says
"""

import re
from typing import Any

from grpo_ext.rollout.chat_turns import Messages
from grpo_ext.rollout.dialogue import TextEnv
from rewards import math_answer_reward


class Calculator(TextEnv):
    """Answers every sum that a turn ends with, such as "8+8+0="; any other turn is the answer to the row's question.

    For a base model, with `stop_strings: ["="]`, so that its turn ends there: what the calculator says stands in the
    middle of the answer. Rows: `prompt` and `answer`. 1.0 for a right answer, 0.0 for a wrong one or none.
    """

    def reset(self, row: dict[str, Any]) -> str | Messages:
        self.gold, self.said = row["answer"], ""
        return row["prompt"]

    def step(self, text: str) -> tuple[str | None, bool]:
        self.said += text
        asked = re.search(r"(\d{1,9}(?:\+\d{1,9}){1,9})=$", text)
        if asked is None:
            return None, True
        result = str(sum(map(int, asked[1].split("+"))))
        self.said += result
        return result, False

    def reward(self) -> float:
        (score,) = math_answer_reward([self.said], [self.gold])
        return score or 0.0


class GuessNumber(TextEnv):
    """Think of a number from 1 to 100; the model guesses, and hears whether it is higher or lower.

    For a chat model. Rows: `answer`, the number. 1.0 where it was guessed; bisection needs no more than 7 turns.
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
