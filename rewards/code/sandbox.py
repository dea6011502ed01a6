"""Runs a Python program that a model wrote where it can do little harm: in bubblewrap (`apt install bubblewrap`).

    run_program("print(input()[::-1])", stdin=b"abc")  ->  Outcome(status="ok", stdout=b"cba\n")

Inside: this process's Python with its standard library and no other package, on a read-only root that holds shared
libraries, /dev/null, /dev/urandom and /dev/zero; a new, empty /tmp in memory; no network, no /proc, no environment, no
host process in sight, no privilege, no system call of `rewards.code.sandbox_policy.DENIED_CALLS`. When the program
ends, or at the deadline, all that it started is killed.

What it does not stop:
- A hole in the kernel: system calls go to this machine's kernel. Only a virtual machine would change that.
- Memory: the kernel counts single processes, so a program can take `memory_mb` x `processes`, beside the others that
  run at the same time. Nor does it stop a program from slowing down whatever shares its cores.
- Reading the shared libraries and the standard library of this machine.
- With `allow_unsandboxed=True`, nearly nothing: the program runs as you, reads and writes your files, uses your network
  and ends your processes. It gets an empty environment, a new working folder, and limits on time, on the memory of a
  process, on the size of a file and on output; what it starts is killed unless it leaves the process group.

Started as root, bwrap opens no user namespace: in one, the program would still be the machine's root, whom no limit on
processes binds. It becomes a user that nothing else runs as. Anybody else gets a user namespace, as user 65534.
"""

import math
import os
import secrets
import select
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from rewards.code.sandbox_policy import bubblewrap, python, seccomp_filter

# Seconds that bwrap and Python may take to start, on a busy machine. The program's own time begins after them.
START_SECONDS = 30
# The range from which systemd takes users that exist only while a service runs.
TRANSIENT_USERS = range(61184, 65520)
LAUNCHER = (Path(__file__).parent / "guest" / "launch.py").read_text()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use; the defaults are recommended.

    Args:
        seconds: of wall-clock time, from the program's first statement.
        memory_mb: address space of one process in MiB; Python itself takes about 20.
        processes: processes and threads at once. Not enforced with `allow_unsandboxed`.
        file_mb: all of /tmp in MiB; with `allow_unsandboxed`, any one file.
        output_kb: standard output in KiB, at most `file_mb`. A program that writes more has failed.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_kb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it had written to its standard output by then.

    Args:
        status: "ok" with exit code 0, "failed" with another one or by a signal, "timeout" at the deadline, "output"
            with too much of it.
        stdout: what it wrote, cut at the limit.
    """

    status: Literal["ok", "failed", "timeout", "output"]
    stdout: bytes


def run_program(
    source: str, *, stdin: bytes = b"", limits: Limits = Limits(), allow_unsandboxed: bool = False
) -> Outcome:
    """Run a program's text as `python program.py` would. Nothing in the text raises: a syntax error is "failed".

    Raises:
        RuntimeError: bwrap or libseccomp is missing, or no sandbox can be made on this machine.
    """
    with ExitStack() as stack:
        program, given, output, log = (
            stack.enter_context(_memory_file(content))
            for content in (source.encode("utf-8", "surrogatepass"), stdin, b"", b"")
        )
        ready, ready_end = (stack.enter_context(FileIO(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True))
        inherited = [program.fileno(), ready_end.fileno()]
        command: list[str] = []
        user = 0
        if allow_unsandboxed:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        else:
            folder = "/"
            user = secrets.choice(TRANSIENT_USERS) if os.geteuid() == 0 else 0
            seccomp = stack.enter_context(_memory_file(seccomp_filter()))
            inherited.append(seccomp.fileno())
            command = [*bubblewrap(limits.file_mb), "--seccomp", str(seccomp.fileno()), "--"]
        command += [str(python()), "-I", "-S", "-B", "-X", "utf8", "-c", LAUNCHER]
        command += map(str, (program.fileno(), ready_end.fileno(), user, *_of_a_process(limits, not allow_unsandboxed)))
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=output,
            stderr=log,
            pass_fds=inherited,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            ready_end.close()
            if not (_readable(ready.fileno(), START_SECONDS) and ready.read(1)):
                why = os.pread(log.fileno(), 4096, 0).decode(errors="replace").strip()
                raise RuntimeError(f"The sandbox for model-written programs does not start on this machine: {why}")
            ended = stack.enter_context(FileIO(os.pidfd_open(process.pid)))
            in_time = _readable(ended.fileno(), limits.seconds)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written = os.pread(output.fileno(), limits.output_kb * 1024 + 1, 0)
    if not in_time:
        return Outcome("timeout", written[: limits.output_kb * 1024])
    if len(written) > limits.output_kb * 1024:
        return Outcome("output", written[:-1])
    return Outcome("failed" if process.returncode else "ok", written)


def _of_a_process(limits: Limits, counted: bool) -> list[str]:
    """What `setrlimit` is to set; a number of processes only where no others of the same user count."""
    values = {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,  # for what outlives an unsandboxed run
        "RLIMIT_AS": limits.memory_mb * 2**20,
        "RLIMIT_FSIZE": limits.file_mb * 2**20,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
    }
    if counted:
        values["RLIMIT_NPROC"] = limits.processes
    return [f"{name}={value}" for name, value in values.items()]


def _memory_file(content: bytes) -> FileIO:
    """An unnamed file, read from its start. Unlike a pipe, it makes nobody wait, whoever holds its other end."""
    file = FileIO(os.memfd_create("program"), "r+")
    file.write(content)
    file.seek(0)
    return file


def _readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))
