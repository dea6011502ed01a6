"""The largest size that fits, asked as few times as possible: each question is a step counted anew."""

from collections.abc import Callable


def largest_multiple(bytes_of: Callable[[int], float], room: float, start: int, bound: int, unit: int) -> int | None:
    """The largest multiple of `unit` up to `bound` whose bytes are within `room`; they grow with it."""
    top = bound // unit
    known: dict[int, float] = {}

    def fits(n: int) -> bool:
        known[n] = bytes_of(n * unit)
        return known[n] <= room

    low = 0  # in units: what fits, as far as is known, and `high`, what does not
    guess = min(max(1, start // unit), top)
    if not top or fits(top):
        return top * unit or None
    high = top
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        if low in known and high in known:
            share = (room - known[low]) / (known[high] - known[low])
            guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        else:
            guess = max(1, high // 2) if low == 0 else min(2 * low, top)
    return low * unit or None
