"""Rewards for test_pool.py, in a module that workers import quickly."""

import math
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path


def child_that_stays():
    child = os.fork()
    if not child:
        time.sleep(100_000)
    return child


def obey(completions, **columns):
    """Does what the completion says, or scores its length."""
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
        case "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        case "fork":
            return [float(child_that_stays())]
        case "fork and exit":
            Path(os.environ["CHILD"]).write_text(str(child_that_stays()), encoding="utf-8")
            os._exit(3)
        case "two":
            return [1.0, 2.0]
        case "unknown":
            return [None]
    return [float(len(text))]


def compared(completions, **columns):
    """1.0 for the longest completions of a call that are longer than all those of earlier calls; "hang" hangs."""
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


class Remembering:
    """Scores a completion by its number among all completions that this object has scored."""

    def __init__(self):
        self.seen = 0

    def __call__(self, completions, **columns):
        self.seen += len(completions)
        return [float(self.seen - len(completions) + row + 1) for row in range(len(completions))]


def report_on(completions, **columns):
    """Scores a completion by the value that it asks for."""
    answers = []
    for text in completions:
        match text:
            case "modules":
                answers.append(float(bool({"torch", "transformers", "sympy", "numpy"} & set(sys.modules))))
            case "step":
                answers.append(float(columns["trainer_state"].global_step / columns["trainer_state"].max_steps))
            case "random":
                answers.append(random.random())
            case "folder":
                answers.append(float(Path("here").exists()))
            case "child":
                process = multiprocessing.Process(target=time.sleep, args=(0,))
                process.start()
                process.join()
                answers.append(float(process.exitcode == 0))
            case "history":
                answers.append(float(len(columns["trainer_state"].log_history)))
    return answers
