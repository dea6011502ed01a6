"""Measure seconds and peak memory per phase of an optimizer step, from outside any GRPO trainer.

sample      `_generate`
reference   `_get_per_token_logps_and_entropies` in the rollout
update      the rest of the step: rewards (cheap here), forward, backward, optimizer
"""

import ctypes
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

PHASES = ("sample", "reference", "update")
SAMPLE_EVERY_S = 0.005
MATMUL_SIZE, MATMUL_TRIES = 2048, 5


class Peak(Protocol):
    """Memory in bytes: `now`, and the `highest` since the last `reset`."""

    def now(self) -> int: ...

    def reset(self) -> None: ...

    def highest(self) -> int: ...


class CudaPeak:
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def highest(self) -> int:
        return torch.cuda.max_memory_allocated()


class KernelPeak:
    """Resident memory, whose high-water mark is kept by Linux and reset on request."""

    def now(self) -> int:
        return self._status("VmRSS")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def highest(self) -> int:
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class SampledPeak:
    """Resident memory polled by a thread, if the kernel does not keep the high-water mark."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._highest = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        return self._process.memory_info().rss

    def reset(self) -> None:
        self._highest = self.now()

    def highest(self) -> int:
        return max(self._highest, self.now())

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, self.now())
            time.sleep(SAMPLE_EVERY_S)


def peak_meter() -> Peak:
    """The best meter for this machine."""
    if torch.cuda.is_available():
        return CudaPeak()
    try:
        meter = KernelPeak()
        meter.reset()
        meter.highest()
    except (OSError, StopIteration):
        return SampledPeak()
    return meter


def release_free_memory() -> None:
    """Return unused memory of Python and the allocator to the system, so that a baseline is memory in use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_flops() -> float:
    """Floating-point operations per second in the fastest of a few large float32 multiplications."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device)
    seconds = []
    for _ in range(MATMUL_TRIES):
        synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / min(seconds)


class StepMeter(TrainerCallback):
    """Seconds and peak bytes per phase of every optimizer step; `watch(trainer)` before `trainer.train()`.

    Nothing outside these steps is measured, such as the worst-case step that runs before the first one.

    With `count_flops`, the first step also counts the operations of its update with torch's `FlopCounterMode`:
    2 x m x n x k per matrix multiplication, and attention itself only on a GPU. With a frozen base, this is
    2 x parameters x tokens for the forward pass, the same for the gradients of the activations, nothing for those of
    the weights (except LoRA's), and another forward pass for what is recomputed, over the tokens that are computed.
    Counting slows the step down, so it must be a warm-up step.
    """

    def __init__(self, peak: Peak, *, count_flops: bool):
        self.peak = peak
        self.seconds: list[dict[str, float]] = []
        self.highest: list[dict[str, int]] = []
        self.update_flops = 0
        self._count_flops = count_flops
        self._counter: FlopCounterMode | None = None
        self._phase: str | None = None
        self._since = 0.0

    def watch(self, trainer: Trainer) -> None:
        trainer.add_callback(self)
        trainer._generate = self._timed(trainer._generate, "sample")
        roll_out, score = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

        def rolled_out(*args: Any, **kwargs: Any) -> Any:
            # In the rollout only: grpo-ext scores each chunk twice if a script replaces this method in the update.
            trainer._get_per_token_logps_and_entropies = self._timed(score, "reference")
            try:
                return roll_out(*args, **kwargs)
            finally:
                del trainer._get_per_token_logps_and_entropies

        trainer._generate_and_score_completions = rolled_out

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(defaultdict(float))
        self.highest.append(defaultdict(int))
        self._turn("update")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turn(None)

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._phase is None:
                return method(*args, **kwargs)
            outer = self._phase
            self._turn(phase)
            output = method(*args, **kwargs)
            self._turn(outer)
            return output

        return timed

    def _turn(self, phase: str | None) -> None:
        """Record the time and memory of the current phase, and begin the next one."""
        synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[-1][self._phase] += now - self._since
            self.highest[-1][self._phase] = max(self.highest[-1][self._phase], self.peak.highest())
        self._count(phase)
        self.peak.reset()
        self._phase = phase
        self._since = time.perf_counter()

    def _count(self, phase: str | None) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.update_flops += self._counter.get_total_flops()
            self._counter = None
        if self._count_flops and len(self.seconds) == 1 and phase == "update":
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
