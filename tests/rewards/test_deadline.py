"""The time limit of a call: it raises, raises again if the call swallows the exception, and leaves no timer behind."""

import signal
import threading
import time

import pytest

from grpo_ext.rewards.workers.deadline import DeadlineExceeded, run_with_deadline
from tests.tools.waiting import becomes


def spin(seconds, *, swallow=False):
    """Computes for some seconds, and swallows exceptions as libraries do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            sum(range(1000))
        except Exception:
            pass
        except BaseException:
            if not swallow:
                raise
            swallow = False
    return "done"


def test_a_call_in_time_returns_its_result_and_leaves_no_timer():
    handler = signal.getsignal(signal.SIGALRM)
    assert run_with_deadline(60, lambda: spin(0.01)) == "done"
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("swallow", [False, True])
def test_a_call_that_takes_longer_is_stopped(swallow):
    """sympy catches every Exception, and sometimes more, so raising only once would not enforce the limit."""
    assert not issubclass(DeadlineExceeded, Exception)
    with pytest.raises(DeadlineExceeded):
        run_with_deadline(0.2, lambda: spin(30, swallow=swallow))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_the_user_still_rings():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert run_with_deadline(60, lambda: spin(0.05)) == "done"
        assert becomes(lambda: rung)
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_off_the_main_thread_the_call_runs_without_a_limit():
    """Python allows signal handlers only in the main thread, but the reward must still work."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run_with_deadline(0.05, lambda: spin(0.2))))
    thread.start()
    thread.join()
    assert results == ["done"]
