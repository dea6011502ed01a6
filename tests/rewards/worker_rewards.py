"""Rewards of test_pool.py, in a module that a worker imports quickly."""

import math
import os
import signal
import sys
import time


def obey(completions, **columns):
    """Does what the completion says; otherwise scores its length."""
    (text,) = completions
    match text:
        case "hang":
            return [float(len(str(9 ** (9**9))))]  # one call into C, which no signal interrupts
        case "sleep":
            time.sleep(100_000)
        case "doze":
            time.sleep(0.4)
        case "raise":
            raise KeyError("no such thing")
        case "exit":
            os._exit(3)
        case "leave":
            sys.exit(0)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "two":
            return [1.0, 2.0]
        case "unknown":
            return [None]
    return [float(len(text))]


def compared(completions, **columns):
    """1.0 for completions longer than all before them, in this call or an earlier one; "hang" hangs."""
    scores = []
    for text in completions:
        if text == "hang":
            obey([text])
        scores.append(float(len(text) > max(_lengths, default=0) and len(text) == max(map(len, completions))))
    _lengths.extend(map(len, completions))
    return scores


_lengths = []


def logged(completions, answer, log_extra, log_metric, trainer_state, **columns):
    """Uses everything that TRL passes, one completion at a time."""
    log_extra("gold", list(answer))
    log_metric("digits", float(sum(c.isdigit() for c in completions[0])))
    return [math.nan if "7" in completions[0] else float(len(completions[0]) + trainer_state.global_step)]


def process_id(completions, **columns):
    return [float(os.getpid())] * len(completions)


process_id.scores_independently = True


class Counting:
    """Compares the completions of a call, and counts the calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, answer, log_extra, log_metric, trainer_state, **columns):
        self.calls += 1
        log_extra("gold", list(answer))
        log_metric("calls", float(self.calls))
        log_metric("seen_step", float(trainer_state.global_step))
        log_metric("process", float(os.getpid() % 2**20))
        longest = max(map(len, completions))
        return [float(len(text) == longest) for text in completions]
