"""The policy of the sandbox in `grpo_ext.rewards.code.sandbox`: the options of bubblewrap, and the denied system calls.

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

# System calls that fail with EPERM: those that an attack on the kernel might need and the standard library does not,
# all sockets except socket pairs, memory that is not covered by any limit (such as extended attributes), and locks,
# leases, queues and notifications, by which programs that run at the same time could signal each other.
DENIED_CALLS = """
    acct add_key adjtimex bpf cachestat chroot clock_adjtime clock_settime delete_module fanotify_init finit_module
    flock fsconfig fsetxattr fsmount fsopen fspick init_module inotify_add_watch inotify_init inotify_init1
    io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie
    lsetxattr mbind memfd_create memfd_secret migrate_pages modify_ldt mount mount_setattr move_mount move_pages
    mq_open msgget name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open personality pidfd_getfd
    pivot_root process_madvise process_vm_readv process_vm_writev ptrace quotactl quotactl_fd reboot request_key
    semget set_mempolicy setdomainname sethostname setns settimeofday setxattr setxattrat shmget socket swapoff swapon
    syslog umount2 unshare uselib userfaultfd vhangup vmsplice
"""
# The commands of fcntl for locks, leases and notifications, which fail with EPERM too.
DENIED_FCNTL = (
    *(5, 6, 7),  # F_GETLK, F_SETLK, F_SETLKW
    *(36, 37, 38),  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
    *(1024, 1025, 1026),  # F_SETLEASE, F_GETLEASE, F_NOTIFY
)
# Calls that change another process if their argument of this number is not 0: runs share the process that starts them.
DENIED_TO_OTHERS = {"prlimit64": 0, "sched_setaffinity": 0, "sched_setattr": 0, "sched_setparam": 0}
DENIED_TO_OTHERS |= {"sched_setscheduler": 0, "setpriority": 1, "ioprio_set": 1}
CLONE_NEWUSER = 0x10000000


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
    """The options for the read-only root: shared libraries, Python with its standard library, and three devices."""
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
    for device in ("/dev/null", "/dev/urandom", "/dev/zero"):
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
    not_equal, masked_equal = 1, 7  # SCMP_CMP_NE, SCMP_CMP_MASKED_EQ
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise RuntimeError(MISSING_MESSAGE.format(what="libseccomp", package="libseccomp2")) from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(allow)))

    def deny(name: str, error: int, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative if this architecture has no such call
            array = (_Comparison * len(comparisons))(*comparisons)
            action = ctypes.c_uint32(fail | error)
            failed = library.seccomp_rule_add_array(context, action, number, len(comparisons), array)
            assert not failed, (name, failed)

    for name in DENIED_CALLS.split():
        deny(name, errno.EPERM)
    for command in DENIED_FCNTL:
        deny("fcntl", errno.EPERM, _Comparison(1, masked_equal, 2**32 - 1, command))
    for name, argument in DENIED_TO_OTHERS.items():
        deny(name, errno.EPERM, _Comparison(argument, not_equal, 0, 0))
    deny("setpriority", errno.EPERM, _Comparison(0, not_equal, 0, 0))  # of a group, or of a user
    deny("ioprio_set", errno.EPERM, _Comparison(0, not_equal, 1, 0))
    deny("clone", errno.EPERM, _Comparison(0, masked_equal, CLONE_NEWUSER, CLONE_NEWUSER))
    deny("clone3", errno.ENOSYS)  # a filter cannot read its flags; the C library falls back to clone
    with FileIO(os.memfd_create("filter"), "r+") as file:
        failed = library.seccomp_export_bpf(context, file.fileno())
        assert not failed, failed
        library.seccomp_release(context)
        file.seek(0)
        return file.readall()
