"""Rewards in worker processes: scores are correct and in order, whatever a completion does to its worker, and no
process is left behind."""

import functools
import gc
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from transformers import TrainerCallback, TrainerState

from grpo_ext.rewards import length_reward, math_answer_reward, program_reward
from grpo_ext.rewards.workers import processes
from grpo_ext.rewards.workers.pool import isolated
from grpo_ext.rewards.workers.processes import WORKER_NAME
from grpo_ext.rollout.reward_workers import in_workers
from tests.rewards.worker_rewards import Counting, Remembering, compared, logged, obey, process_id, report_on
from tests.tools.lanes import slow_but
from tests.tools.models import random_lora
from tests.tools.paths import ROOT
from tests.tools.training import log_of
from tests.tools.waiting import PATIENCE, becomes

TIMEOUT = 1.0  # seconds per completion


@pytest.fixture
def new_workers():
    """`new_workers()`: the process ids of workers that this process started since the test began."""
    before = workers_of(os.getpid())
    return lambda: workers_of(os.getpid()) - before


@pytest.fixture
def safe():
    made = []

    def make(reward=obey, **settings):
        made.append(isolated(reward, **{"timeout_s": TIMEOUT, "workers": 2} | settings))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_scores_are_those_of_the_reward_in_order(safe):
    completions = ["a" * (i % 7) + "b" for i in range(200)]
    reward = safe()
    assert reward(completions=completions) == [len(text) for text in completions]
    answers = [str(i % 10) for i in range(40)]
    texts = [f"#### {i % 9}" for i in range(40)]
    plain = math_answer_reward(completions=texts, answer=answers)
    assert 0 < sum(plain) < 40
    assert safe(math_answer_reward, timeout_s=20.0)(completions=texts, answer=answers) == plain


@pytest.mark.parametrize(
    ("text", "kind"),
    slow_but(
        [
            ("hang", "timeouts"),
            ("sleep", "timeouts"),
            ("raise", "errors"),
            ("exit", "crashes"),
            ("crash", "crashes"),
            ("leave", "errors"),
            ("two", "errors"),
        ],
        [("raise", "errors")],
    ),
)
def test_a_failure_costs_one_completion(safe, text, kind):
    """The others keep their scores, and a call that hangs is stopped at the timeout of one completion."""
    reward = safe()
    reward(completions=["warm up"])
    assert reward(completions=["one", text, "three", "unknown", "fifth"]) == [3, None, 5, None, 5]
    failed = {"timeouts": 0, "crashes": 0, "errors": 0} | {kind: 1}
    assert vars(reward.failures) == {"completions": 6} | failed


@pytest.mark.slow
def test_batched_calls(safe, new_workers, caplog):
    """A reward may compare completions and remember them, so it has one worker. A failure costs the whole call, and the
    warning says how to limit the cost to one completion."""
    reward = safe(compared, workers=None)
    assert reward(completions=["one", "three", "a"]) == [0.0, 1.0, 0.0]
    assert reward(completions=["six"]) == [0.0]
    assert len(new_workers()) == 1
    assert reward(completions=["a", "hang", "abc", "b", "c", "d"]) == [None] * 6
    warning = r"took longer than 6 s on 6 completions, the first being 'a'\. .*scores_independently"
    assert re.search(warning, caplog.text)
    assert vars(reward.failures) == {"completions": 10, "timeouts": 6, "crashes": 0, "errors": 0}
    assert reward(completions=["one"]) == [1.0]


def test_too_many_failures_stop_the_run(safe):
    """Five failures are always tolerated. The sixth, out of eleven completions, stops the run. The message names the
    reward and shows a completion."""
    reward = safe()
    assert reward(completions=["raise"] * 5 + ["fine"] * 5)[5:] == [4.0] * 5
    with pytest.raises(RuntimeError, match=r"'obey' raised KeyError.* 'raise'.* 6 of the last 11 completions"):
        reward(completions=["raise"])
    reward = safe()
    reward(completions=["fine"] * 150)
    assert reward(completions=["raise"] * 7) == [None] * 7


def test_a_failed_whole_call_counts_once(safe):
    """If each of its completions counted, the first failure of a call with more than five would end the run."""

    def fails(completions, **columns):
        raise KeyError

    reward = safe(fails, workers=None, timeout_s=60)
    for _ in range(5):
        assert reward(completions=["a"] * 60) == [None] * 60
    with pytest.raises(
        RuntimeError, match=r"on 60 completions.* failed on 6 of the last 6 calls.*scores_independently"
    ):
        reward(completions=["a"] * 60)


def test_a_reward_that_logs_is_stopped_in_time(safe):
    """A reward that retries a request and logs each attempt must not live forever, kept alive by its log records."""

    def retries(completions, **columns):
        while True:
            logging.getLogger("a.judge").warning("retry")
            time.sleep(0.05)

    reward = safe(retries, workers=None)
    assert reward(completions=["a"]) == [None]
    assert reward.failures.timeouts == 1


def test_on_error_raise_stops_at_the_first_failure(safe):
    with pytest.raises(RuntimeError, match=r"'obey' raised KeyError\('no such thing'\) on the completion 'raise'"):
        safe(on_error="raise")(completions=["fine", "raise"])


def test_a_reward_that_cannot_be_set_up_is_reported(safe):
    class Stubborn:
        __name__ = "stubborn"

        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

        def __reduce__(self):
            return exec, ("raise ImportError('a library that is not there')",)

    with pytest.raises(RuntimeError, match="Reward 'stubborn' cannot be set up in a worker"):
        safe(Stubborn())(completions=["a"])


def test_a_reward_that_hangs_while_it_is_set_up_is_reported(safe, monkeypatch):
    """An import that waits for a lock or a download would otherwise block the training without a word."""
    monkeypatch.setattr(processes, "SETUP_SECONDS", 2)

    class Waiting:
        __name__ = "waiting"

        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

        def __reduce__(self):
            return time.sleep, (100_000,)

    with pytest.raises(RuntimeError, match=r"'waiting' cannot be set up in a worker: 3 workers .* longer than 2 s"):
        safe(Waiting())(completions=["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"workers": 0}, "workers=0"),
        ({"on_error": "skip"}, "on_error='skip'"),
        ({"batched": True, "workers": 2}, "workers=2 with batched=True"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        isolated(obey, **settings)


@pytest.mark.slow
def test_off_the_main_thread(safe, new_workers):
    """Workers must not end with the thread that started them."""
    reward, got = safe(), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: got.append(reward(completions=["a", "hang", "abc"])))
        thread.start()
        thread.join()
    assert got == [[1, None, 3]] * 2
    assert reward(completions=["a", "abcd"]) == [1, 4]
    workers = new_workers()
    assert len(workers) in (1, 2)  # the killed one is replaced if it is needed
    assert reward(completions=["abcd"]) == [4]
    assert new_workers() == workers


def test_a_worker_outlives_the_thread_that_started_it(safe):
    """Linux can end a process with the thread that started it. An idle worker would lose the state of its reward."""
    reward, scores = safe(Remembering(), workers=None, timeout_s=60), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: scores.extend(reward(completions=["a"])))
        thread.start()
        thread.join()
    assert scores == [1.0, 2.0]


@pytest.mark.slow
def test_a_worker_that_no_longer_reads_is_replaced(safe, new_workers, monkeypatch):
    """What a call has left behind in its worker may keep it from reading the next task, which fills the connection."""
    monkeypatch.setattr(processes, "SETUP_SECONDS", 10)
    reward = safe(workers=1, timeout_s=60)
    assert reward(completions=["a"]) == [1.0]
    (worker,) = new_workers()
    os.kill(worker, signal.SIGSTOP)
    assert reward(completions=["a" * 10**7]) == [10.0**7]


@pytest.mark.slow
def test_overhead(safe):
    """Less than one millisecond per completion, excluding the reward itself, on a machine that is idle for a second."""
    reward = safe(timeout_s=20.0)
    reward(completions=["warm up"])
    assert becomes(lambda: seconds_of(reward, ["a"] * 1000) < 1.0)


@pytest.mark.slow
def test_completions_are_scored_in_parallel(safe):
    reward = safe(timeout_s=20.0, workers=4)
    reward(completions=["warm up"] * 8)
    assert becomes(lambda: seconds_of(reward, ["doze"] * 8) < 8 * 0.4 / 2)


def seconds_of(reward, completions):
    started = time.monotonic()
    reward(completions=completions)
    return time.monotonic() - started


# With a trainer


@pytest.mark.slow
def test_in_training(build, small_model, safe):
    """Columns, logs and state come from TRL, and failures appear in the metrics."""
    reward = safe(logged, timeout_s=20.0)
    columns = {"answer": ["a", "b", "c", "d"]}
    trainer = build(small_model, peft_config=random_lora(), reward=reward, columns=columns)
    trainer.train()
    gold = dict(zip(trainer.train_dataset["prompt"], columns["answer"], strict=True))
    logs = trainer._logs
    assert list(logs["extra"]["gold"]) == [gold[prompt] for prompt in logs["prompt"]]
    assert len(log_of(trainer, "digits")) == 2
    for kind in ("timeouts", "crashes", "errors"):
        assert log_of(trainer, f"rewards/logged/{kind}") == [0.0, 0.0]
    scores = [s for s in logs["rewards"]["logged"] if not math.isnan(s)]
    assert scores
    assert all(score >= 0 for score in scores)


@pytest.mark.slow
def test_every_reward_in_workers(build, small_model, new_workers):
    """`reward_workers=N`: rewards that score independently share N workers. Any other reward gets whole calls in one
    worker, where it keeps its state. With `runs_in_process` it stays in this process. Workers end with the training."""

    def here(completions, **columns):
        return [float(os.getpid())] * len(completions)

    here.runs_in_process = True
    columns = {"answer": ["a", "b", "c", "d"]}
    rewards = [process_id, Counting(), here]
    trainer = build(small_model, peft_config=random_lora(), reward=rewards, reward_workers=2, columns=columns)
    trainer.train()
    logged, this = trainer._logs["rewards"], float(torch.tensor(os.getpid()).float())
    assert set(logged["here"]) == {this}
    assert this not in logged["process_id"]
    assert log_of(trainer, "calls") == [1.0, 2.0]
    assert log_of(trainer, "seen_step") == [0.0, 1.0]
    assert log_of(trainer, "process")[0] == log_of(trainer, "process")[1] != os.getpid() % 2**20
    longest = [0.0] * len(logged["Counting"])
    for start in range(0, len(longest), 8):  # a call has the 8 completions of a step
        lengths = [len(text) for text in list(trainer._logs["completion"])[start : start + 8]]
        longest[start : start + 8] = [float(length == max(lengths)) for length in lengths]
    assert list(logged["Counting"]) == longest
    gold = dict(zip(trainer.train_dataset["prompt"], columns["answer"], strict=True))
    assert list(trainer._logs["extra"]["gold"]) == [gold[prompt] for prompt in trainer._logs["prompt"]]
    assert not new_workers()


def test_which_rewards_are_isolated():
    """By default a plain function stays here: in a worker it would see a copy of the program that never changes."""

    def plain(completions, **columns):
        return [1.0] * len(completions)

    async def asked_elsewhere(completions, **columns):
        return [1.0] * len(completions)

    others = [asked_elsewhere, "a/reward-model", torch.nn.Linear(1, 1), program_reward, length_reward]
    given = [plain, Counting(), *others]
    assert in_workers(given, None, 1.0) is given
    assert in_workers([plain, math_answer_reward], 0, 1.0) == [plain, math_answer_reward]
    sent = in_workers([*others, functools.partial(obey, unit=2), math_answer_reward], 2, 1.0)
    assert sent[:-2] == others
    assert [reward.__name__ for reward in sent[-2:]] == ["obey", "math_answer_reward"]
    assert in_workers(sent, None, 1.0) is sent
    (math,) = in_workers([functools.partial(math_answer_reward, prompts=None)], None, 1.0)
    assert math.__name__ == "math_answer_reward"


# What a worker is given


def test_a_worker_stays_small(safe):
    """Unpickling transformers' own `TrainerState` would import torch in every worker: six seconds and 290 MB for a
    one-line reward."""
    state = TrainerState(global_step=3, max_steps=12, log_history=[{"reward": 1.0}] * 1000)
    reward = safe(report_on, workers=None)
    assert reward(completions=["modules", "step"], trainer_state=state) == [0.0, 0.25]
    with pytest.raises(RuntimeError, match=r"trainer_state\.log_history is not sent to a worker. Call this reward in"):
        safe(report_on, workers=None, on_error="raise")(completions=["history"], trainer_state=state)


def test_random_numbers_repeat(safe):
    """They depend on seed, step and row alone: a resumed run draws the numbers of an uninterrupted one."""

    def drawn(reward, step, rows=3):
        return reward(completions=["random"] * rows, trainer_state=TrainerState(global_step=step))

    rows, other_seed = safe(report_on, seed=3), safe(report_on, seed=4)
    first = drawn(rows, 1)
    assert len({*first, *drawn(rows, 2), *drawn(other_seed, 1)}) == 9
    assert drawn(rows, 1, rows=5)[:3] == first
    whole = safe(report_on, workers=None, seed=3)
    first = drawn(whole, 1)
    assert drawn(whole, 2) != first
    assert drawn(whole, 1) == first


def test_folder_processes_and_log(safe, tmp_path, monkeypatch, caplog):
    """A reward in a worker reads the files, starts the processes and writes the log that it would in the run."""

    def tells(completions, **columns):
        logging.getLogger("a.judge").info("scored %s", completions[0])
        return report_on(completions)

    reward = safe(tells, workers=None, timeout_s=60)
    (tmp_path / "here").touch()
    with caplog.at_level(logging.INFO, logger="a.judge"):
        assert reward(completions=["folder", "child"]) == [0.0, 1.0]
    assert ("a.judge", logging.INFO, "scored folder") in caplog.record_tuples
    monkeypatch.chdir(tmp_path)
    assert reward(completions=["folder"]) == [1.0]


RETURNED = {
    "tuple": lambda scores: tuple(scores),
    "array": np.array,
    "tensor": torch.tensor,
    "series": pd.Series,
    "generator": iter,
    "numbers of numpy": lambda scores: list(np.array(scores)),
    "fractions": lambda scores: [Fraction(score) for score in scores],
    "with None": lambda scores: [None, *scores[1:]],
}


@pytest.mark.parametrize("kind", RETURNED)
def test_return_types(safe, kind):
    """Every return type that TRL accepts also works through a worker."""
    to = RETURNED[kind]
    reward = safe(lambda completions, **columns: to([float(len(text)) for text in completions]), workers=None)
    assert reward(completions=["a", "bcd"]) == [None if kind == "with None" else 1.0, 3.0]


@pytest.mark.parametrize("wrong", ["1.0", b"2", [1.0], 1j])
def test_what_is_not_a_score(safe, wrong):
    """TRL rejects text, although `float` would parse it."""
    with pytest.raises(RuntimeError, match="TypeError"):
        safe(lambda completions, **columns: [wrong], workers=None, on_error="raise")(completions=["a"])


# What cannot be sent


def test_what_cannot_be_sent_is_named_at_the_call(safe):
    """A reward may be picklable only until the trainer exists, because it refers to the trainer afterwards."""
    holder = {}

    def judge(completions, **columns):
        return [1.0] * len(completions) if holder else []

    reward = safe(judge, workers=None)
    holder["trainer"] = threading.Lock()
    with pytest.raises(
        ValueError, match=r"Reward 'judge' cannot be sent to a worker: .*call the reward in the training process"
    ):
        reward(completions=["a"])
    with pytest.raises(ValueError, match=r"Argument 'image' of reward 'obey' cannot be sent to a worker"):
        safe()(completions=["a"], image=[threading.Lock()])

    async def asked(completions, **columns):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="Reward 'asked' is asynchronous"):
        isolated(asked)


# The life of workers


def test_an_idle_worker_may_be_killed(safe, new_workers, caplog):
    """The system kills processes when memory is short. That costs a new worker, and the state that the reward had."""
    reward, remembers = safe(), safe(Remembering(), workers=None)
    for _ in range(2):
        assert reward(completions=["a", "abc"]) == [1, 3]
        assert remembers(completions=["a", "b"]) == [1.0, 2.0]
        assert not [record for record in caplog.records if "has ended" in record.message]
        for worker in new_workers():
            os.kill(worker, signal.SIGKILL)
        assert becomes(lambda: not new_workers())
        if _ == 0:
            remembers.close()  # new workers, but no state is lost unexpectedly
    assert remembers(completions=["c"]) == [1.0]
    assert "The worker of reward 'Remembering' has ended" in caplog.text


@pytest.mark.parametrize("ending", ["close", "exit", "kill"])
def test_what_a_reward_has_forked_ends_with_its_worker(safe, new_workers, monkeypatch, tmp_path, ending):
    """A judge that starts servers would leave them behind, with their memory, whenever its worker ends."""
    path = tmp_path / "child"
    monkeypatch.setenv("CHILD", str(path))
    reward = safe()
    if ending == "exit":
        assert reward(completions=["fork and exit"]) == [None]
        child = int(path.read_text())
    else:
        child = int(reward(completions=["fork"])[0])
        assert is_alive(child)
    if ending == "kill":
        for worker in new_workers():
            os.kill(worker, signal.SIGKILL)
        assert becomes(lambda: not new_workers())
        assert reward(completions=["a", "b", "c", "d"]) == [1.0] * 4
    reward.close()
    assert becomes(lambda: not is_alive(child))


def test_independent_rewards_share_workers(safe, new_workers):
    """Otherwise three rewards on four cores would be twelve processes, each with sympy in memory."""
    for reward in (safe(), safe(process_id), safe(report_on)):
        reward(completions=["random"] * 4)
    assert len(new_workers()) == 2


@pytest.mark.parametrize("ending", ["end", "refused", "raised", "dropped"])
def test_workers_end_with_the_run(build, small_model, new_workers, ending):
    """Otherwise three refused runs in a notebook would leave three workers behind, with a gigabyte of memory."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    reward = isolated(Remembering())
    trainer = build(
        small_model,
        peft_config=random_lora(),
        reward=reward,
        guards=ending == "refused",
        arguments={"callbacks": [Stop()] if ending == "raised" else []},
    )
    if ending == "refused":
        small_model.requires_grad_(False)
        with pytest.raises(ValueError, match="No trainable parameters"):
            trainer.train()
    elif ending == "raised":
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    elif ending == "dropped":
        reward(completions=["a"])
        assert new_workers()
        del trainer
        gc.collect()
    else:
        trainer.train()
        assert len(log_of(trainer, "rewards/Remembering/mean")) == 2
    assert becomes(lambda: not new_workers())


# Orphans


SCRIPT = """
import signal
from grpo_ext.rewards.workers.pool import isolated

def reward(completions, **columns):
    if completions[0] == "hang":
        return [float(len(str(9 ** (9 ** 9))))]
    return [float(len(completions[0]))]

print("imported", __name__, flush=True)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with SIGINT ignored
    safe = isolated(reward, timeout_s=100_000.0, workers=2)
    assert safe(completions=["a", "bc"]) == [1.0, 2.0]
    print("ready", flush=True)
    safe(completions=["hang", "hang", "a"])
"""


def workers_of(process):
    """The process ids of the workers of a process."""
    return {child.pid for child in psutil.Process(process).children() if is_worker(child)}


def is_worker(process):
    try:
        return any(WORKER_NAME in part for part in process.cmdline())
    except psutil.NoSuchProcess:  # or a zombie: it has just ended
        return False


def is_alive(process):
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def test_a_worker_survives_sigterm():
    """A scheduler sends it to every process of a job, and the training process still scores the step that it ends."""
    safe = isolated(obey, timeout_s=60, workers=1)
    assert safe(completions=["terminated", "four"]) == [10.0, 4.0]
    assert safe.failures.crashes == 0
    safe.close()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans(tmp_path, ending):
    """Ctrl-C, SIGTERM and SIGKILL while every worker is inside a call that no signal interrupts. The reward is a
    function of the script, which workers must not import again."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "output").open("w+") as output:
        parent = subprocess.Popen(
            [sys.executable, script], stdout=output, stderr=output, env=environment, start_new_session=True
        )
        assert becomes(lambda: "ready" in (tmp_path / "output").read_text() or parent.poll() is not None)
        time.sleep(0.5)  # until both are inside a call
        workers = workers_of(parent.pid)
        assert len(workers) == 2, (tmp_path / "output").read_text()
        if ending == signal.SIGINT:
            os.killpg(parent.pid, ending)  # as a terminal does
        else:
            parent.send_signal(ending)
        assert parent.wait(timeout=PATIENCE) != 0
    assert becomes(lambda: not any(map(is_alive, workers)))
    assert (tmp_path / "output").read_text().count("imported") == 1
