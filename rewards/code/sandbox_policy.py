"""The policy of the sandbox in `grpo_ext.rewards.code.sandbox`: its system calls, and bubblewrap's options.

bubblewrap_command(16)  ->  ["/usr/bin/bwrap", "--unshare-pid", ..., "--remount-ro", "/"]
seccomp_filter()        ->  a BPF program, compiled by libseccomp and loaded by bwrap
"""

import ctypes
import errno
import functools
import os
import shutil
import sys
import sysconfig
from io import FileIO
from pathlib import Path

MISSING_MESSAGE = (
    "Code rewards run model-written programs. {what} was not found: install {package} (apt install {package}), "
    "or pass allow_unsandboxed=True after reading the docstring of grpo_ext.rewards.code.sandbox."
)

# The system calls that a program may make with any arguments. `CONDITIONAL_CALLS` has those that depend on them. All
# others fail with ENOSYS, as on a kernel without them, so the C library falls back to older calls.
ALLOWED_CALLS = """
    access alarm arch_prctl brk chdir chmod chown clock_getres clock_gettime clock_nanosleep close close_range
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fallocate fchdir fchmod fchmodat fchmodat2 fchown
    fchownat fdatasync fgetxattr flistxattr fork fstat fstatfs fsync ftruncate futex futex_waitv futimesat get_mempolicy
    get_robust_list getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid
    getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
    gettid gettimeofday getuid getxattr kill lchown lgetxattr link linkat listxattr llistxattr lseek lstat madvise
    membarrier mkdir mkdirat mknod mknodat mprotect mremap msync munmap nanosleep newfstatat open openat openat2 pause
    pidfd_open pidfd_send_signal pipe pipe2 poll ppoll prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2
    read readlink readlinkat readv recvfrom recvmmsg recvmsg rename renameat renameat2 restart_syscall rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_yield select sendfile sendmmsg sendmsg sendto set_robust_list
    set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setregid setresgid setresuid setreuid setrlimit
    setsid setuid shutdown sigaltstack signalfd signalfd4 splice stat statfs statx symlink symlinkat sysinfo tee tgkill
    time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write
    writev
"""
CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
AF_UNIX = 1
# A call is allowed if, for one of its rows, argument number `argument`, masked with `mask`, equals `value`.
CONDITIONAL_CALLS: dict[str, list[tuple[int, int, int]]] = {
    "clone": [(0, CLONE_NAMESPACES, 0)],
    # no locks, leases and notifications, by which programs that run at the same time could signal each other
    "fcntl": [
        (1, 2**32 - 1, command)
        for command in (
            *(0, 1, 2, 3, 4),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL
            *(1030, 1031, 1032),  # F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ
        )
    ],
    "ioctl": [
        (1, 2**32 - 1, request)
        for request in (
            *(0x5401, 0x5413),  # TCGETS, TIOCGWINSZ: whether this is a terminal, and its size
            *(0x541B, 0x5421, 0x5450, 0x5451),  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        )
    ],
    # no shared memory without a file: it stays in use after all but one page of it is unmapped, and no limit counts it
    "mmap": [(3, MAP_SHARED | MAP_ANONYMOUS, flags) for flags in (0, MAP_SHARED, MAP_ANONYMOUS)],
    "socketpair": [(0, 2**32 - 1, AF_UNIX)],
    # of the calling process only: runs share the process that starts them
    **{
        name: [(0, 2**32 - 1, 0)]
        for name in ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
    },
}


def host_python() -> Path:
    """The interpreter of this process, with the symbolic link of a virtual environment resolved."""
    return Path(sys.executable).resolve()


def bubblewrap_command(file_mb: int) -> list[str]:
    """The command line that starts the sandbox, without `--seccomp` and the program.

    Args:
        file_mb: size of /tmp in MiB.

    Raises:
        RuntimeError: bwrap is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise RuntimeError(MISSING_MESSAGE.format(what="bwrap", package="bubblewrap"))
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent"
    options += " --new-session --hostname sandbox --cap-drop ALL"
    if os.geteuid() == 0:
        options += " --cap-add CAP_SETUID --cap-add CAP_SETGID"  # needed by the launcher, which then drops them
    else:
        options += " --unshare-user --uid 65534 --gid 65534"
    scratch = f"--perms 1777 --size {file_mb * 2**20} --tmpfs /tmp --chdir /tmp --remount-ro /"
    return [bwrap, *options.split(), *_mounts(), *scratch.split()]


@functools.cache
def _mounts() -> tuple[str, ...]:
    """The options for the read-only root: shared libraries, Python with its standard library, and two devices."""
    options = []
    prefix = Path(sys.base_prefix).resolve()
    libraries = [Path(base) / name for base in ("/", "/usr", prefix) for name in ("lib", "lib64")]
    for path in dict.fromkeys([*libraries, Path("/etc/ld.so.cache"), host_python()]):
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            # Without --dir, bwrap creates the parent directories so that only its own user may enter them.
            options += ["--dir", str(path.parent), "--ro-bind", str(path), str(path)]
    base = {"base": str(prefix), "platbase": str(prefix)}
    packages = [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    for folder in dict.fromkeys([*packages, "/usr/lib/python3/dist-packages"]):
        if Path(folder).is_dir():
            options += ["--tmpfs", folder, "--remount-ro", folder]
    for device in ("/dev/null", "/dev/urandom"):
        options += ["--dir", "/dev", "--dev-bind", device, device]
    return tuple(options)


class _Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: compares argument number `argument` of a call, masked with `mask`, with `value`."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


@functools.cache
def seccomp_filter() -> bytes:
    """The filter for `bwrap --seccomp`. System calls of any other architecture kill the program.

    Raises:
        RuntimeError: libseccomp is not installed.
    """
    allow, fail = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
    masked_equal = 7  # SCMP_CMP_MASKED_EQ
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise RuntimeError(MISSING_MESSAGE.format(what="libseccomp", package="libseccomp2")) from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(fail | errno.ENOSYS)))

    def allow_call(name: str, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative if this architecture, or this version of libseccomp, has no such call
            array = (_Comparison * len(comparisons))(*comparisons)
            failed = library.seccomp_rule_add_array(context, ctypes.c_uint32(allow), number, len(comparisons), array)
            assert not failed, (name, failed)

    for name in ALLOWED_CALLS.split():
        allow_call(name)
    for name, rows in CONDITIONAL_CALLS.items():
        for argument, mask, value in rows:
            allow_call(name, _Comparison(argument, masked_equal, mask, value))
    # priority of the calling process: PRIO_PROCESS, 0
    allow_call("setpriority", _Comparison(0, masked_equal, 2**32 - 1, 0), _Comparison(1, masked_equal, 2**32 - 1, 0))
    with FileIO(os.memfd_create("filter"), "r+") as file:
        failed = library.seccomp_export_bpf(context, file.fileno())
        assert not failed, failed
        library.seccomp_release(context)
        file.seek(0)
        return file.readall()
