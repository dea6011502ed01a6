"""A cursor over tokens, for readers of LaTeX that look one token ahead."""


class Cursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0

    def peek(self) -> str:
        """The next token; "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def next(self) -> str:
        """The next token, after which the cursor moves on; "" at the end."""
        token = self.peek()
        self.place += 1
        return token
