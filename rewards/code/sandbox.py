"""Runs a model-written Python program in bubblewrap (`apt install bubblewrap`), where it can do little harm.

    run_program("print(input()[::-1])", stdin=b"abc")  ->  Outcome(status="ok", stdout=b"cba\n")

Inside the sandbox a program finds:

- this process's Python with its standard library and no other package, on a read-only root with shared libraries,
  /dev/null and /dev/urandom
- a new, empty /tmp in memory
- no network, no /proc, no environment variables, no host processes and no privileges
- the system calls in `grpo_ext.rewards.code.sandbox_policy.ALLOWED_CALLS` and no others, so no sockets except socket
  pairs, no file locks (and no SQLite databases in files), and no extended attributes
- no shared memory without a file, such as `mmap.mmap(-1, size)`, and no semaphores, which `multiprocessing.Pool` needs

When the program ends, or at the deadline, every process that it started is killed.

bubblewrap is a tool for building sandboxes, not a sandbox with a security policy of its own. The protection is what its
options and the seccomp filter in `sandbox_policy.py` give, and no more. What they do not stop:

- Kernel vulnerabilities: the allowed system calls go to the kernel of this machine. Only a virtual machine would change
  that. gVisor is not supported.
- Memory for a moment: the kernel limits each process, and every WATCH_SECONDS all processes of a program are measured
  together. Until then, a program can use up to `memory_mb` x `processes`. Buffers of pipes and sockets are not counted,
  and several programs run at the same time, each with its own limit. If this matters, run the training in a control
  group with a memory limit. A program can also slow down whatever shares its cores.
- Files without content: they are counted every WATCH_SECONDS, so a program may exceed `files` for that long.
- Channels by timing: programs that run at the same time can signal each other by the load of shared cores and caches.
  Expected values are in none of them.
- Reading the shared libraries and the standard library of this machine.
- With `allow_unsandboxed=True`, nearly anything: the program runs as your user, and can read and write your files, use
  your network and end your processes. It still gets an empty environment, a new working directory, and limits on time,
  on memory, on the size of a file and on output. The processes that it starts are killed unless they leave its process
  group, and their memory counts unless their parent has ended.

If this process runs as root, bwrap creates no user namespace: inside one, the program would still be the machine's root
user, who is exempt from the limit on processes. Instead, the program switches to a transient user id, which no other
sandbox of this process has. For any other user, bwrap creates a user namespace with user 65534.
"""

import math
import os
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Literal

from grpo_ext.rewards.code.memory import memory_exceeds
from grpo_ext.rewards.code.sandbox_policy import bubblewrap_command, host_python, seccomp_filter

# Time limit for starting bwrap and Python on a busy machine. The program's own time starts after that.
START_TIMEOUT_SECONDS = 30
WATCH_SECONDS = 0.05  # how often memory is measured, and the files in /tmp are counted
# systemd's range for dynamic users, which exist only while a service runs.
TRANSIENT_USERS = range(61184, 65520)
LAUNCHER = (Path(__file__).parent / "guest" / "launch.py").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program. The defaults are recommended.

    Args:
        seconds: wall-clock time from the program's first statement.
        memory_mb: address space of one process in MiB, and memory of all processes of the program together, measured
            every WATCH_SECONDS. A program that uses more fails. Python itself takes about 20.
        processes: processes and threads at the same time. Not enforced with `allow_unsandboxed`.
        file_mb: total size of /tmp in MiB; with `allow_unsandboxed`, the size of each file.
        files: files and folders in /tmp, counted every WATCH_SECONDS. A program with more of them fails. Not enforced
            with `allow_unsandboxed`.
        output_kb: size of standard output in KiB, at most `file_mb`. A program that writes more fails.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    files: int = 4096
    output_kb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and its standard output until then.

    Args:
        status: "ok" for exit code 0, "failed" for any other exit code or a signal, "timeout" at the deadline, "output"
            if it wrote too much.
        stdout: standard output, truncated at the limit.
        seconds: time from the program's first statement to its end.
    """

    status: Literal["ok", "failed", "timeout", "output"]
    stdout: bytes
    seconds: float = field(default=0.0, compare=False)


def run_program(
    source: str, *, stdin: bytes = b"", limits: Limits = Limits(), allow_unsandboxed: bool = False
) -> Outcome:
    """Run a program as `python program.py` would. No error in the program raises here: a syntax error is "failed".

    Args:
        source: text of the program.
        stdin: its standard input.
        limits: its resource limits.
        allow_unsandboxed: run it without bubblewrap, as your own user; see the docstring of this module.

    Raises:
        RuntimeError: bwrap or libseccomp is missing, or no sandbox can be started on this machine.
    """
    with Sandbox(source, limits=limits, allow_unsandboxed=allow_unsandboxed) as sandbox:
        return sandbox.run(stdin)


class Sandbox:
    """Runs one program on many inputs. A run finds no files, processes or memory of an earlier one.

        with Sandbox("print(input()[::-1])") as sandbox:
            sandbox.run(b"abc"), sandbox.run(b"xyz")

    The runs share one start of bubblewrap and Python: each is a new process, forked from one that has not run any of
    the program. After a run that exceeded a limit or wrote to /tmp, the next one starts a new sandbox. So does
    every run with `allow_unsandboxed`.

    Args:
        source: text of the program.
        limits: resource limits of each run.
        modules: modules of the standard library to import before the runs, so that each run imports them at once.
        allow_unsandboxed: as in `run_program`.
    """

    def __init__(
        self,
        source: str,
        *,
        limits: Limits = Limits(),
        modules: tuple[str, ...] = (),
        allow_unsandboxed: bool = False,
    ):
        self._source, self._limits, self._modules = source, limits, modules
        self._allow_unsandboxed = allow_unsandboxed
        self._started: _Started | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the sandbox and every process in it."""
        if self._started is not None:
            self._started.end()
            self._started = None

    def run(self, stdin: bytes = b"", *, seconds: float | None = None) -> Outcome:
        """Run the program.

        Args:
            stdin: its standard input.
            seconds: a time limit in place of `limits.seconds`.

        Raises:
            RuntimeError: as in `run_program`.
        """
        seconds = self._limits.seconds if seconds is None else seconds
        with _memory_file(stdin) as given, _memory_file(b"") as output:
            begun = self._started is not None and self._started.begin(given, output)
            if not begun:
                self.close()
                self._started = _Started(self._source, self._limits, self._modules, self._allow_unsandboxed)
                begun = self._started.begin(given, output)
            assert self._started is not None
            if not begun:
                raise _start_error(self._started.log())
            status: Literal["ok", "failed", "timeout", "output"]
            status, elapsed = self._started.watch(seconds, self._limits)
            if status == "timeout" or self._allow_unsandboxed or not self._started.is_clean():
                self.close()
            stdout = os.pread(output.fileno(), self._limits.output_kb * 1024 + 1, 0)
        if status != "timeout" and len(stdout) > self._limits.output_kb * 1024:
            status = "output"
        return Outcome(status, stdout[: self._limits.output_kb * 1024], elapsed)


class _Started:
    """A started sandbox, in which `guest/launch.py` waits for runs."""

    def __init__(self, source: str, limits: Limits, modules: tuple[str, ...], allow_unsandboxed: bool):
        self._kept = ExitStack()
        self._log = self._kept.enter_context(_memory_file(b""))
        self._process: subprocess.Popen[bytes] | None = None
        self._is_sandbox = not allow_unsandboxed
        try:
            self._start(source, limits, modules)
        except BaseException:
            self.end()
            raise

    def _start(self, source: str, limits: Limits, modules: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = self._kept.enter_context(ours)
        with ExitStack() as stack:
            stack.enter_context(theirs)
            program = stack.enter_context(_memory_file(source.encode("utf-8", "surrogatepass")))
            inherited = [program.fileno(), theirs.fileno()]
            command: list[str] = []
            user = 0
            folder = "/"
            if self._is_sandbox:
                user = self._kept.enter_context(_reserved_user()) if os.geteuid() == 0 else 0
                seccomp = stack.enter_context(_memory_file(seccomp_filter()))
                inherited.append(seccomp.fileno())
                command = [*bubblewrap_command(limits.file_mb), "--seccomp", str(seccomp.fileno()), "--"]
            else:
                folder = self._kept.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            command += [str(host_python()), "-I", "-S", "-B", "-X", "utf8", "-c", LAUNCHER]
            command += map(str, (program.fileno(), theirs.fileno(), user, int(self._is_sandbox), ",".join(modules)))
            command += _rlimit_arguments(limits, self._is_sandbox)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=inherited,
                env={},
                cwd=folder,
                start_new_session=True,
            )
        message, descriptors = b"", list[int]()
        if _wait_readable(ours.fileno(), START_TIMEOUT_SECONDS):
            message, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
        if not message or not descriptors:
            raise _start_error(self.log())
        self._tmp = descriptors[0]  # a path only: its usage can be queried, but it cannot be read
        self._kept.callback(os.close, self._tmp)
        self._used_at_start = self._used()

    def log(self) -> str:
        """What bubblewrap and the launcher wrote, such as the reason why they cannot start."""
        return os.pread(self._log.fileno(), 4096, 0).decode(errors="replace").strip()

    def begin(self, given: FileIO, output: FileIO) -> bool:
        """Start a run, and wait for the program's first statement. False if the sandbox has ended."""
        try:
            socket.send_fds(self._control, [b"r"], [given.fileno(), output.fileno()])
            return (
                _wait_readable(self._control.fileno(), START_TIMEOUT_SECONDS) and self._control.recv(64) == b"started"
            )
        except OSError:
            return False

    def watch(self, seconds: float, limits: Limits) -> tuple[Literal["ok", "failed", "timeout"], float]:
        """Wait for the end of a run. Returns how it ended, and its seconds."""
        begun = time.monotonic()
        while True:
            left = begun + seconds - time.monotonic()
            if left <= 0:
                return "timeout", seconds
            if _wait_readable(self._control.fileno(), min(left, WATCH_SECONDS)):
                try:
                    message = self._control.recv(64)
                except OSError:
                    message = b""
                return ("ok" if message == b"0" else "failed"), time.monotonic() - begun
            if self._exceeds(limits):
                self.end()
                return "failed", time.monotonic() - begun

    def _exceeds(self, limits: Limits) -> bool:
        """Whether the run exceeds a limit that the kernel does not know."""
        assert self._process is not None
        has_too_many_files = self._is_sandbox and self._used()[0] - self._used_at_start[0] > limits.files
        return has_too_many_files or memory_exceeds(self._process.pid, limits.memory_mb * 2**20)

    def is_clean(self) -> bool:
        """Whether the last run left the sandbox as it was."""
        return self._process is not None and self._used() == self._used_at_start

    def _used(self) -> tuple[int, int, int]:
        """The number of files and of blocks in use in /tmp, and when the folder was last changed."""
        state = os.fstatvfs(self._tmp)
        changed = os.fstat(self._tmp).st_ctime_ns
        return state.f_files - state.f_ffree, state.f_blocks - state.f_bfree, changed

    def end(self) -> None:
        """Kill every process of the sandbox."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._kept.close()


_reserved_users: set[int] = set()
_reserving = threading.Lock()


@contextmanager
def _reserved_user() -> Iterator[int]:
    """A user id of its own for one sandbox: the limit on processes is one per user."""
    with _reserving:
        while (user := secrets.choice(TRANSIENT_USERS)) in _reserved_users:
            pass
        _reserved_users.add(user)
    try:
        yield user
    finally:
        _reserved_users.remove(user)


def _start_error(log: str) -> RuntimeError:
    return RuntimeError(f"The sandbox for model-written programs cannot be started on this machine: {log}")


def _rlimit_arguments(limits: Limits, limit_processes: bool) -> list[str]:
    """Arguments of the launcher for `setrlimit`, as NAME=VALUE.

    Without the sandbox the number of processes is not limited: it would count all processes of the same user.
    """
    values = {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,  # ends what outlives an unsandboxed run
        "RLIMIT_AS": limits.memory_mb * 2**20,
        "RLIMIT_FSIZE": limits.file_mb * 2**20,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
    }
    if limit_processes:
        values["RLIMIT_NPROC"] = limits.processes
    return [f"{name}={value}" for name, value in values.items()]


def _memory_file(content: bytes) -> FileIO:
    """An unnamed file in memory, positioned at its start. Unlike a pipe, it never blocks the reader or the writer."""
    file = FileIO(os.memfd_create("program"), "r+")
    file.write(content)
    file.seek(0)
    return file


def _wait_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))
