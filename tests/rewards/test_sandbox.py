"""The sandbox as two tables of what a program may try, and its other guarantees."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import CDLL
from pathlib import Path

import psutil
import pytest

from grpo_ext.rewards.code import sandbox, sandbox_policy
from grpo_ext.rewards.code.memory import memory_exceeds
from grpo_ext.rewards.code.sandbox import Limits, Outcome, Sandbox, run_program
from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE, becomes

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true",
    reason="bwrap is missing: apt install bubblewrap",
)

SHORT = Limits(seconds=0.5)
BASE_PACKAGES = [
    Path(sysconfig.get_path("purelib", vars={"base": sys.base_prefix})),
    Path("/usr/lib/python3/dist-packages"),
]

# An attempt that returns has escaped; one that raises was stopped.
ATTEMPT = """
import ctypes, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def attempt():
    {attempt}
try:
    print("escaped", attempt())
except Exception as error:
    print("stopped", repr(error))
"""

# Each of these must succeed without the sandbox. The fixture `outside` has the values of the names in braces.
ESCAPES = {
    # files of the machine, the user and the project
    "users": "return open('/etc/passwd').read()",
    "users by a relative path": "return open('../' * 20 + 'etc/passwd').read()",
    "users by a link": "os.symlink('/etc', 'link'); return open('link/passwd').read()",
    "programs": "return subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "packages of the training": "sys.path.append('{packages}'); import pytest; return pytest",
    "packages of the interpreter": "return os.listdir('{base_packages}')[0]",
    "the project": "return open('{root}/README.md').read()",
    "home": "return [name for name in os.listdir('{home}') if '{home}/' + name not in sys.prefix][0]",
    "a known file": "return open('{folder}/secret').read()",
    # processes and the kernel
    "processes": "return os.listdir('/proc')",
    "the environment of a process": "return open('/proc/{pid}/environ').read()",
    "a signal to a process": "return os.kill({pid}, 0)",
    "tracing": "return checked(libc.ptrace(0, 0, 0, 0))",
    "kernel settings": "return open('/proc/sys/kernel/hostname').read()",
    "kernel devices": "return os.listdir('/sys/class')",
    "a terminal": "return os.openpty()",
    "the machine's name": "assert os.uname().nodename == '{host}'",
    # connections
    "TCP": "return socket.create_connection(('127.0.0.1', {port}))",
    "UDP": "return socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "a unix socket": "socket.socket(socket.AF_UNIX).connect('{folder}/socket')",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect(chr(0) + '{abstract}')",
    "the kernel's network interface": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    # memory that is not covered by any limit
    "files in memory": "return os.memfd_create('x')",
    "shared memory": "return checked(libc.shmctl(checked(libc.shmget(0, 4096, 0o1600)), 0, None))",
    "shared memory as a file": "file = open('/dev/shm/{abstract}', 'w'); os.remove(file.name); return file",
}

# Calls that attacks on a kernel have used, or that no limit covers.
NOT_ALLOWED = """
    add_key bpf clone3 fanotify_init fsconfig fsopen init_module io_setup io_uring_setup kcmp kexec_load keyctl
    memfd_create memfd_secret mount mount_setattr move_mount mq_open msgget name_to_handle_at open_by_handle_at
    perf_event_open personality pidfd_getfd pivot_root process_vm_readv process_vm_writev ptrace remap_file_pages
    request_key seccomp semget setns setsockopt setxattr shmget socket sync umount2 unshare userfaultfd vmsplice
""".split()

# These would do harm without the sandbox, or need root.
HARMFUL = {
    # files
    "passwords": "return open('/etc/shadow').read()",
    "writing to the root": "return open('/escaped', 'w')",
    "writing to the standard library": "return open(os.__file__, 'a')",
    "changing the interpreter": "return os.chmod(sys.executable, 0o777)",
    "linking out of /tmp": "return os.link(os.__file__, '/tmp/os.py')",
    "a setuid program": "return os.execv('/usr/bin/su', ['su'])",
    "another root": "return os.chroot('/tmp')",
    "mounting": "os.mkdir('/tmp/m'); return checked(libc.mount(b'proc', b'/tmp/m', b'proc', 0, None))",
    "making the root writable": "return checked(libc.mount(b'none', b'/', None, 0x1020, None))",
    "unmounting": "return checked(libc.umount2(b'/tmp', 2))",
    # devices
    "a disk": "return [open(disk, 'rb') for disk in ('/dev/sda', '/dev/vda') if os.path.exists(disk)][0]",
    "memory": "return open('/dev/mem', 'rb')",
    "a new device": "return os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))",
    # privileges
    "becoming root": "return os.setuid(0)",
    "root's group": "return os.setgroups([0])",
    "a user namespace": "return checked(libc.unshare(0x10000000))",
    "a new name for the machine": "return socket.sethostname('escaped')",
    "more memory": "return resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more processes": "return resource.setrlimit(resource.RLIMIT_NPROC, (4096, 4096))",
    "priority": "return os.nice(-5)",
    "limits of another process": "return resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "priority of another process": "return os.setpriority(os.PRIO_PROCESS, os.getppid(), 9)",
    "priority of a user": "return os.setpriority(os.PRIO_USER, 0, 9)",
    "cores of another process": "return os.sched_setaffinity(os.getppid(), {0})",
    # memory that no limit counts
    "extended attributes": "open('x', 'w').close(); return os.setxattr('x', 'user.x', bytes(65000))",
    "shared memory in no file": "import mmap; return mmap.mmap(-1, 4096)",
    "shared memory of a device": "import mmap; return mmap.mmap(open('/dev/zero', 'r+b').fileno(), 4096)",
    # channels between programs, through the files that all of them can read
    "flock": "import fcntl; return fcntl.flock(open(os.__file__), fcntl.LOCK_EX)",
    "a lock of fcntl": "import fcntl; return fcntl.lockf(open(os.__file__), fcntl.LOCK_SH)",
    "a lock of fcntl by another number": "return checked(libc.syscall(72, 3, ctypes.c_long(2**32 + 5), bytes(32)))",
    "a lease": "import fcntl; return fcntl.fcntl(open(os.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "inotify": "return checked(libc.inotify_init1(0))",
    "dnotify": "import fcntl; return fcntl.fcntl(os.open('/lib', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
    "a name look-up": "return socket.getaddrinfo('example.com', 80)",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> dict[str, object]:
    """What a program could find: paths, this process, and listening sockets of every kind."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("secret")
    abstract = uuid.uuid4().hex
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
    ):
        for server, address in ((named, str(folder / "socket")), (unnamed, "\0" + abstract)):
            server.bind(address)
            server.listen()
        yield {
            "folder": folder,
            "abstract": abstract,
            "port": tcp.getsockname()[1],
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "home": Path.home(),
            "root": ROOT,
            "packages": Path(pytest.__file__).parent.parent,
            "base_packages": next(folder for folder in BASE_PACKAGES if folder.is_dir() and any(folder.iterdir())),
        }


def attempt(line: str, outside: dict[str, object]) -> str:
    for name, value in outside.items():
        line = line.replace(f"{{{name}}}", str(value))
    return ATTEMPT.replace("{attempt}", line)


@pytest.mark.parametrize("name", [*ESCAPES, *HARMFUL])
def test_attempts_are_stopped(name, outside):
    """If a part of the sandbox is missing, at least one attempt of the table succeeds."""
    assert run_program(attempt((ESCAPES | HARMFUL)[name], outside)).stdout.startswith(b"stopped")


@pytest.mark.parametrize("name", ESCAPES)
def test_without_the_sandbox_the_attempts_succeed(name, outside):
    """An attempt that always fails would prove nothing about the sandbox."""
    assert run_program(attempt(ESCAPES[name], outside), allow_unsandboxed=True).stdout.startswith(b"escaped")


def test_other_system_calls_do_not_exist():
    """Every number but those of the allowed calls: with a deny list, each call that a kernel adds would be open."""
    library = CDLL("libseccomp.so.2")

    def numbers(names: Iterable[str]) -> set[int]:
        return {library.seccomp_syscall_resolve_name(name.encode()) for name in names}

    allowed = numbers([*sandbox_policy.ALLOWED_CALLS.split(), *sandbox_policy.CONDITIONAL_CALLS, "setpriority"])
    assert not allowed & {number for number in numbers(NOT_ALLOWED) if number >= 0}
    # Filters do not apply to uretprobe and uprobe on x86_64. They kill a program that is not traced.
    others = set(range(600)) - allowed - ({335, 336} if os.uname().machine == "x86_64" else set())
    outcome = run_program(f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def error(number, *arguments):
    return "none" if libc.syscall(number, *arguments) != -1 else errno.errorcode[ctypes.get_errno()]
print({{number for number in {others} if error(number, 0, 0, 0, 0, 0, 0) != "ENOSYS"}})
print(error({library.seccomp_syscall_resolve_name(b"clone")}, 0x10000011, 0, 0, 0, 0))
print(error({library.seccomp_syscall_resolve_name(b"socketpair")}, 30, 1, 0, 0))
print(error({library.seccomp_syscall_resolve_name(b"ioctl")}, 0, 0x5412, b"x"))
""")
    assert outcome.stdout.split() == [b"set()", b"ENOSYS", b"ENOSYS", b"ENOSYS"]


FAILED, TIMEOUT, OUTPUT, OK = "failed", "timeout", "output", "ok"

IGNORES_SIGNALS = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
time.sleep(600)
"""
DAEMON = """
import os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
time.sleep(600)
"""
COUNTS_FORKS = """
import os, time
count = 0
try:
    while True:
        if not os.fork(): time.sleep(600)
        count += 1
except OSError:
    print(10 < count < 16)
"""
COUNTS_THREADS = """
import threading, time
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        count += 1
except RuntimeError:
    print(10 < count < 16)
"""
EACH_PROCESS_TAKES_100_MB = """
import os, time
for _ in range(10):
    if not os.fork():
        memory = bytearray(100 * 2**20)
        time.sleep(600)
time.sleep(30)
print(10)
"""
ONE_MB_EACH = EACH_PROCESS_TAKES_100_MB.replace("100", "1").replace("30", "1")
SHARED_AFTER_FORKS = "memory = bytearray(300 * 2**20)" + ONE_MB_EACH
ASYNC_SUBPROCESS = """
import asyncio, sys
async def main():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=asyncio.subprocess.PIPE)
    print((await process.communicate())[0])
asyncio.run(main())
"""
PIPE_OF_MULTIPROCESSING = """
import multiprocessing
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
process = context.Process(target=theirs.send, args=([1],))
process.start()
print(ours.recv())
process.join()
"""
FILLS_THE_DISK = """
total = 0
try:
    while True: total += open(f"{total}", "wb").write(bytes(10**5))
except OSError:
    print(10**7 < total <= 2**24)
"""
FLOODS_WITH_FILES = """
for number in range(10**7): open(f"/tmp/{number}", "w").close()
"""
OPEN_FILES = """
import os
for number in range(256):
    try: print(number, os.fstat(number).st_rdev == os.stat("/dev/null").st_rdev)
    except OSError: pass
"""

# The program, how it ends, and what it writes. None accepts anything.
BEHAVIOURS = [
    # ordinary programs
    ("print(input()[::-1])", OK, b"cba\n"),
    ("import sys; print(sys.argv, __name__, sys.stdin.read())", OK, b"['program.py'] __main__ abc\n"),
    ("print(1); exit()", OK, b"1\n"),
    ("print(1); quit(3)", FAILED, b"1\n"),
    ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", OK, b"True\n"),
    ("import asyncio\nasync def f(): print(1)\nasyncio.run(f())", OK, b"1\n"),
    ("import threading; t = threading.Thread(target=print, args=(1,)); t.start(); t.join()", OK, b"1\n"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", OK, b"3\n"),
    ("print('é', '\\U0001f600')", OK, "é \U0001f600\n".encode()),
    ("x = " + "1 + " * 2000 + "1\nprint(x)", OK, b"2001\n"),
    ("import sys; print(1, file=sys.stderr)", OK, b""),
    ("", OK, b""),
    ("import subprocess as s, sys; print(s.check_output([sys.executable, '-c', 'print(1)']))", OK, b"b'1\\n'\n"),
    (ASYNC_SUBPROCESS, OK, b"b'1\\n'\n"),
    (PIPE_OF_MULTIPROCESSING, OK, b"[1]\n"),
    ("from concurrent.futures import ThreadPoolExecutor as T; print(*T(4).map(abs, (-1, -2)))", OK, b"1 2\n"),
    ("import shutil; open('x', 'w').write('y'); print(shutil.copy2('x', 'z'))", OK, b"z\n"),
    ("import mmap; print(mmap.mmap(0, 0, access=mmap.ACCESS_READ)[:])", OK, b"b'abc'\n"),
    # not programs
    ("def", FAILED, b""),
    ("\0", FAILED, b""),
    ("\ud800", FAILED, b""),
    ("(" * 100_000, FAILED, b""),
    ("I think that the answer is 42.", FAILED, b""),
    # all kinds of endings
    ("1 / 0", FAILED, b""),
    ("import os; os._exit(0)", OK, b""),
    ("import os; os.abort()", FAILED, b""),
    ("import ctypes; ctypes.string_at(0)", FAILED, b""),
    ("import os; os.kill(os.getpid(), 9)", FAILED, b""),
    ("import os; os.kill(-1, 9)", None, b""),
    ("import os; os.kill(1, 9); print(1)", None, None),
    ("f = lambda: f()\nf()", FAILED, b""),
    ("import sys; sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", None, b""),
    ("x = []\nfor _ in range(10**6): x = [x]\nimport sys; sys.setrecursionlimit(10**9); repr(x)", FAILED, b""),
    ("import os; os.close(0); os.close(1); os.close(2)", None, b""),
    ("import os\nfor n in range(256):\n  try: os.write(n, b'x')\n  except OSError: pass", OK, None),
    # time
    ("while True: pass", TIMEOUT, b""),
    ("print(1, flush=True)\nwhile True: pass", TIMEOUT, b"1\n"),
    ("10 ** 10 ** 10", TIMEOUT, b""),  # one call into C, which no Python signal handler interrupts
    ("import time; time.sleep(600)", TIMEOUT, b""),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", TIMEOUT, b""),
    (IGNORES_SIGNALS, TIMEOUT, b""),
    (DAEMON, OK, b""),
    ("import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()", TIMEOUT, b""),
    # memory
    ("bytearray(10**10)", FAILED, b""),
    ("x = [0]\nwhile True: x += x", FAILED, b""),
    ("import mmap; mmap.mmap(-1, 10**9, mmap.MAP_PRIVATE)", FAILED, b""),
    (EACH_PROCESS_TAKES_100_MB, FAILED, b""),
    (SHARED_AFTER_FORKS, OK, b"10\n"),
    # processes
    ("import os\nwhile True: os.fork()", None, b""),
    (COUNTS_FORKS, OK, b"True\n"),
    (COUNTS_THREADS, OK, b"True\n"),
    # files
    ("open('x', 'wb').write(bytes(2 * 10**7))", FAILED, b""),
    ("open('x', 'wb').truncate(10**12)", FAILED, b""),
    (FILLS_THE_DISK, OK, b"True\n"),
    (FLOODS_WITH_FILES, FAILED, b""),
    # output
    ("print('x' * 10**7)", OUTPUT, None),
    ("for _ in range(1000): print('x' * 10**6)", OUTPUT, None),
    ("import os; os.ftruncate(1, 10**7)", OUTPUT, None),
    ("import os; os.ftruncate(1, 10**12)", FAILED, b""),
    ("import os; os.posix_fallocate(1, 0, 10**12)", FAILED, b""),
    # the environment of a program
    (OPEN_FILES, OK, b"0 False\n1 False\n2 True\n"),
    ("import os; print(os.listdir(), sorted(os.listdir('/dev')))", OK, b"[] ['null', 'urandom']\n"),
    ("import os; print({*os.environ} <= {'PWD', 'LC_CTYPE'})", OK, b"True\n"),
    ("import resource; print(resource.getrlimit(resource.RLIMIT_CORE))", OK, b"(0, 0)\n"),
]


@pytest.mark.parametrize(("program", "status", "stdout"), BEHAVIOURS, ids=range(len(BEHAVIOURS)))
def test_behaviours(program, status, stdout):
    """None of these does harm, hangs or raises. Each ends as expected, and its output until then is kept."""
    started = time.monotonic()
    outcome = run_program(program, stdin=b"abc", limits=SHORT if status in (TIMEOUT, None) else Limits(seconds=20))
    assert status is None or outcome.status == status
    assert stdout is None or outcome.stdout == stdout
    assert len(outcome.stdout) <= 2**20
    assert time.monotonic() - started < 300  # nobody waited for the end of a sleeping program


def running(word: str) -> Path | None:
    """The folder of a process on this machine whose command line ends with the word."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().endswith(word.encode() + b"\0"):
                return process
        except OSError:  # the process has ended
            pass
    return None


STAYS = """
import os, sys
for _ in range(2):
    if os.fork():
        {parent}
    os.setsid()
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(100_000)", {word!r}])
"""


def run_that_is_seen(pool: ThreadPoolExecutor, program: str, word: str, **options: bool) -> Future[Outcome]:
    """Start the program until a process whose command line ends with the word is seen, and return that run. On a busy
    machine, Python may take longer to start than the first limit allows, so later attempts have longer limits."""
    for seconds in (3, 30, 300):
        run = pool.submit(run_program, program, limits=Limits(seconds=seconds), **options)
        while not run.done():
            if running(word):
                return run
    raise AssertionError("the program was not seen running")


@pytest.mark.parametrize("parent", ["os._exit(0)", "os.wait()"])
def test_nothing_is_left_running(parent):
    """Daemons must end with the program that started them, or at its deadline. Otherwise they would accumulate."""
    word = uuid.uuid4().hex
    with ThreadPoolExecutor() as pool:
        program = STAYS.format(parent=parent, word=word)
        if parent == "os.wait()":
            run_that_is_seen(pool, program, word).result()
        else:
            run_program(program, limits=Limits(seconds=60))
    assert becomes(lambda: not running(word))


def test_the_sandbox_seen_from_outside():
    """Some layers are hidden behind others, so no attempt from inside would show that one is missing."""
    word = uuid.uuid4().hex
    with ThreadPoolExecutor() as pool:
        pool.submit(run_program, STAYS.format(parent="os.wait()", word=word), limits=Limits(seconds=PATIENCE))
        assert becomes(lambda: running(word))
        process = running(word)
        for namespace in ("net", "pid", "ipc", "uts", "mnt", "cgroup"):
            assert (process / "ns" / namespace).readlink() != Path("/proc/self/ns", namespace).readlink(), namespace
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        mounts = [line.split()[4:6] for line in (process / "mountinfo").read_text().splitlines()]
        next(parent for parent in psutil.Process(int(process.name)).parents() if parent.name() == "bwrap").kill()
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert 0 not in map(int, status["Uid"].split() + status["Gid"].split())
    writable = {point for point, options in mounts if options.startswith("rw")}
    assert writable == {"/tmp", "/dev/null", "/dev/urandom"}


def test_programs_end_with_the_training():
    """If the training is killed, its programs must end too, since nothing enforces their deadline then."""
    word = uuid.uuid4().hex
    program = STAYS.format(parent="os.wait()", word=word)
    training = "from grpo_ext.rewards.code.sandbox import *; "
    training += f"run_program({program!r}, limits=Limits(seconds=100_000))"
    process = subprocess.Popen([sys.executable, "-c", training], cwd=ROOT)
    assert becomes(lambda: running(word))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert becomes(lambda: not running(word))


def test_a_program_finds_nothing_from_an_earlier_one():
    """A module planted in the working directory would be imported by later programs."""
    plant = "import os\nfor n in ('json', 'decimal'): open(f'/tmp/{n}.py', 'w').write('print(1)')\nprint(os.listdir())"
    assert b"json.py" in run_program(plant).stdout
    assert run_program("import os, json, decimal; print(os.listdir('/tmp'))").stdout == b"[]\n"


def test_programs_run_in_parallel():
    """Threads of one process must not mix up the inputs, outputs or file descriptors of their programs."""
    with ThreadPoolExecutor(4) as pool:
        outcomes = pool.map(lambda n: run_program("print(input())", stdin=b"%d" % n), range(24))
        assert [outcome.stdout for outcome in outcomes] == [b"%d\n" % n for n in range(24)]


def test_limits_of_the_caller_are_applied():
    """Otherwise an ignored limit would only show when a program exceeds it."""
    limits = Limits(seconds=20, memory_mb=1024, processes=4, file_mb=2, output_kb=1)
    program = "import os, resource as r; s = os.statvfs('/tmp'); print(s.f_blocks * s.f_frsize, "
    program += "*[r.getrlimit(n)[1] for n in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, r.RLIMIT_CPU)])"
    assert run_program(program, limits=limits).stdout.split() == [b"%d" % n for n in (2**21, 2**30, 4, 2**21, 21)]
    assert run_program("print('x' * 1023)", limits=limits).status == OK
    outcome = run_program("print('x' * 1024)", limits=limits)
    assert (outcome.status, len(outcome.stdout)) == (OUTPUT, 1024)


def test_runs_share_the_start_of_a_sandbox():
    """A step has thousands of tests. If each started bubblewrap and Python, most of the step would be spent there."""

    def seconds(function: Callable[[], object]) -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    starts = min(seconds(lambda: run_program("")) for _ in range(10))
    with Sandbox("") as sandbox:
        sandbox.run()
        assert min(seconds(sandbox.run) for _ in range(20)) < starts / 1.5


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root and a system Python")
def test_other_users_than_root_get_a_user_namespace():
    """For them bubblewrap gets other options, which tests that run as root would never use."""
    programs = ["import os; print(os.getuid())", COUNTS_FORKS, ATTEMPT.replace("{attempt}", HARMFUL["unmounting"])]
    programs += [
        EACH_PROCESS_TAKES_100_MB,
        SHARED_AFTER_FORKS,
    ]
    # Imported while still root: other users may not be able to enter the folders of TMPDIR and of the checkout.
    script = f"""import os
from grpo_ext.rewards.code.sandbox import Sandbox, run_program
os.chdir("/")
os.setgroups([])
os.setgid(61000)
os.setuid(61000)
for program in {programs}: print(run_program(program).stdout)
with Sandbox("import os; print(input(), os.getpid(), os.listdir())") as sandbox:
    print(*(sandbox.run(line).stdout.split() for line in (b"a", b"b")))"""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "grpo_ext", "rewards")
        shutil.copytree(ROOT / "rewards", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / "__init__.py").write_text("", encoding="utf-8")  # the system's Python has no packages
        done = subprocess.run(["/usr/bin/python3", "-c", script], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.splitlines()
    assert shown[:2] == [rb"b'65534\n'", rb"b'True\n'"]
    assert b"stopped" in shown[2]
    assert shown[3:5] == [b"b''", rb"b'10\n'"]
    assert shown[5] == b"[b'a', b'3', b'[]'] [b'b', b'4', b'[]']"  # two processes of one sandbox


def test_root_becomes_an_unused_user():
    """A program started by root must not own any file or process of the machine, so it gets an unused user id."""
    user = int(run_program("import os; assert os.getuid() == os.getgid(); print(os.getuid())").stdout)
    assert user == 65534 or 61184 <= user < 65520
    script = (
        "from grpo_ext.rewards.code.sandbox import *; print(run_program('import os; print(os.getgroups())').stdout)"
    )
    options = {"extra_groups": (7,)} if os.geteuid() == 0 else {}
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, check=True, **options)
    assert shown.stdout in (b"b'[]\\n'\n", b"b'[65534]\\n'\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user than root has a namespace per sandbox")
def test_simultaneous_sandboxes_have_different_users(monkeypatch):
    """The kernel limits processes per user: two programs of one user would take them from each other."""
    monkeypatch.setattr(sandbox, "TRANSIENT_USERS", range(61184, 61186))
    program = "import os; print(os.getuid())"
    for _ in range(10):
        with Sandbox(program) as one, Sandbox(program) as other:
            assert {one.run().stdout, other.run().stdout} == {b"61184\n", b"61185\n"}


def test_processes_that_end_while_their_memory_is_measured():
    """A process may disappear from /proc between two reads. If that raised, it would end the training."""
    program = "import os\nwhile True:\n  if not os.fork(): os._exit(0)\n  os.wait()"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", program])
    try:
        assert not any(memory_exceeds(process.pid, 2**50) for _ in range(3000))
    finally:
        process.kill()
        process.wait()


def test_refused_without_bubblewrap(monkeypatch):
    """If bubblewrap is not installed, programs must not run unprotected, and the message says what to install."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"bwrap was not found: install bubblewrap \(apt install bubblewrap\), or"):
        run_program("print(1)")
    assert run_program("print(1)", allow_unsandboxed=True).stdout == b"1\n"


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    """If bwrap may not create namespaces, every program would silently score 0."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="No permissions to create new namespace"):
        run_program("print(1)")


def test_what_remains_without_the_sandbox(monkeypatch):
    """`allow_unsandboxed` still guarantees an empty environment, a new working directory, limits and termination."""
    monkeypatch.setenv("SECRET", "1")
    program = "import os; print('SECRET' in os.environ, os.listdir(), os.getcwd())"
    outcome = run_program(program, allow_unsandboxed=True)
    assert outcome.stdout.startswith(b"False [] ")
    assert not Path(outcome.stdout.split()[-1].decode()).exists()
    assert run_program(EACH_PROCESS_TAKES_100_MB, allow_unsandboxed=True).status == FAILED
    for program, status in (
        ("bytearray(10**10)", FAILED),
        ("open('x', 'wb').write(bytes(2 * 10**7))", FAILED),
        ("print('x' * 10**7)", OUTPUT),
        ("while True: pass", TIMEOUT),
    ):
        assert run_program(program, limits=SHORT, allow_unsandboxed=True).status == status
    program = "import resource; print(resource.getrlimit(resource.RLIMIT_NPROC))"
    here = resource.getrlimit(resource.RLIMIT_NPROC)  # all processes of this user count, so it must not be lowered
    assert run_program(program, allow_unsandboxed=True).stdout.decode() == f"{here}\n"
    word = uuid.uuid4().hex
    child = STAYS.format(parent="os.wait()", word=word).replace("os.setsid()", "pass")
    with ThreadPoolExecutor() as pool:
        assert run_that_is_seen(pool, child, word, allow_unsandboxed=True).result().status == TIMEOUT
    assert becomes(lambda: not running(word))
