"""Runs a model-written Python program in bubblewrap (`apt install bubblewrap`), where it can do little harm.

    run_program("print(input()[::-1])", stdin=b"abc")  ->  Outcome(status="ok", stdout=b"cba\n")

Inside the sandbox a program finds:

- this process's Python with its standard library and no other package, on a read-only root with shared libraries,
  /dev/null, /dev/urandom and /dev/zero
- a new, empty /tmp in memory
- no network, no /proc, no environment variables, no host processes and no privileges
- none of the system calls in `grpo_ext.rewards.code.sandbox_policy.DENIED_CALLS`

When the program ends, or at the deadline, every process that it started is killed.

What the sandbox does not stop:

- Kernel vulnerabilities: system calls go to the kernel of this machine. Only a virtual machine would change that.
- Memory use: the kernel limits each process separately, so a program can use up to `memory_mb` x `processes`, and
  several programs run at the same time. It can also slow down whatever shares its cores.
- Reading the shared libraries and the standard library of this machine.
- With `allow_unsandboxed=True`, nearly anything: the program runs as your user, and can read and write your files, use
  your network and end your processes. It still gets an empty environment, a new working directory, and limits on time,
  on the memory of a process, on the size of a file and on output. The processes that it starts are killed unless they
  leave its process group.

If this process runs as root, bwrap creates no user namespace: inside one, the program would still be the machine's root
user, who is exempt from the limit on processes. Instead, the program switches to a user id that nothing else uses. For
any other user, bwrap creates a user namespace with user 65534.
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

from grpo_ext.rewards.code.sandbox_policy import bubblewrap_command, host_python, seccomp_filter

# Time limit for starting bwrap and Python on a busy machine. The program's own time starts after that.
START_TIMEOUT_SECONDS = 30
# systemd's range for dynamic users, which exist only while a service runs.
TRANSIENT_USERS = range(61184, 65520)
LAUNCHER = (Path(__file__).parent / "guest" / "launch.py").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program. The defaults are recommended.

    Args:
        seconds: wall-clock time from the program's first statement.
        memory_mb: address space of one process in MiB. Python itself takes about 20.
        processes: processes and threads at the same time. Not enforced with `allow_unsandboxed`.
        file_mb: total size of /tmp in MiB; with `allow_unsandboxed`, the size of each file.
        output_kb: size of standard output in KiB, at most `file_mb`. A program that writes more fails.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_kb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and its standard output until then.

    Args:
        status: "ok" for exit code 0, "failed" for any other exit code or a signal, "timeout" at the deadline, "output"
            if it wrote too much.
        stdout: standard output, truncated at the limit.
    """

    status: Literal["ok", "failed", "timeout", "output"]
    stdout: bytes


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
            command = [*bubblewrap_command(limits.file_mb), "--seccomp", str(seccomp.fileno()), "--"]
        command += [str(host_python()), "-I", "-S", "-B", "-X", "utf8", "-c", LAUNCHER]
        command += map(
            str, (program.fileno(), ready_end.fileno(), user, *_rlimit_arguments(limits, not allow_unsandboxed))
        )
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
            if not (_wait_readable(ready.fileno(), START_TIMEOUT_SECONDS) and ready.read(1)):
                why = os.pread(log.fileno(), 4096, 0).decode(errors="replace").strip()
                raise RuntimeError(f"The sandbox for model-written programs cannot be started on this machine: {why}")
            ended = stack.enter_context(FileIO(os.pidfd_open(process.pid)))
            in_time = _wait_readable(ended.fileno(), limits.seconds)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout = os.pread(output.fileno(), limits.output_kb * 1024 + 1, 0)
    if not in_time:
        return Outcome("timeout", stdout[: limits.output_kb * 1024])
    if len(stdout) > limits.output_kb * 1024:
        return Outcome("output", stdout[:-1])
    return Outcome("failed" if process.returncode else "ok", stdout)


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
