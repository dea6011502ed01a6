"""Rewards of test_preflight.py that fail when they are tried, in a module that a worker imports quickly."""


def raises(completions, **columns):
    raise KeyError("solution")


def too_few(completions, **columns):
    return [1.0]


def words(completions, **columns):
    return ["good"] * len(completions)


async def fails_elsewhere(completions, **columns):
    raise ConnectionError("no judge there")


for reward in (raises, too_few, words, fails_elsewhere):
    vars(reward)["scores_independently"] = True
