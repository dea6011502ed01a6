"""The math reward: extract the final answer of a completion, parse it, and compare it with the gold answer."""
