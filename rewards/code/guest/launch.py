"""Sandbox script: runs a program once per input, each time in a new process. Sent into the sandbox as text.

    python -c <this file> SOURCE CONTROL USER SHARED MODULES RLIMIT_AS=536870912 RLIMIT_CORE=0 ...

SOURCE is the file descriptor of the program's text, and CONTROL that of a socket to the training process. USER is the
user id to switch to, or 0 to keep the current one. SHARED is 1 if several runs may share this sandbox. MODULES are the
modules to import before the first run, separated by commas.

On CONTROL, this script first sends "ready", with the folder /tmp. Then, for each standard input and output that it
receives, it sends "started" right before the program's first statement, and the exit status when the program and the
processes that it started have ended. It never runs the program in its own process.
"""

import _socket
import array
import builtins
import gc
import os
import resource
import signal
import sys
import time


def main() -> None:
    """Drop all privileges and serve the runs; return only in the process of a run, which then becomes the program."""
    source_file, control_file, user, shared = map(int, sys.argv[1:5])
    modules, limits = sys.argv[5], sys.argv[6:]
    with os.fdopen(source_file, "rb") as file:
        source = file.read()
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # normally added by the module `site`, which is disabled
    for module in filter(None, modules.split(",")):
        __import__(module)
    gc.freeze()  # a run then need not copy the pages of these objects when it ends
    control = _socket.socket(fileno=control_file)
    folder = os.open("/tmp", os.O_PATH)
    control.sendmsg([b"ready"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [folder]))])
    while True:
        message, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(8))
        if not message:
            os._exit(0)
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        child = os.fork()
        if not child:
            break
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        if shared:
            kill_all_others()
        control.send(str(os.waitstatus_to_exitcode(status)).encode())
    os.dup2(streams[0], 0)
    os.dup2(streams[1], 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for limit in limits:
        name, _, wanted = limit.partition("=")
        kind = getattr(resource, name)
        allowed = resource.getrlimit(kind)[1]
        value = int(wanted) if allowed == resource.RLIM_INFINITY else min(int(wanted), allowed)
        resource.setrlimit(kind, (value, value))
    sys.argv[:] = ["program.py"]
    program = sys.modules["__main__"] = type(sys)("__main__")
    control.send(b"started")  # an error before this message is the sandbox's; after it, the program's
    control.close()
    os.closerange(3, 256)
    exec(compile(source, "program.py", "exec", dont_inherit=True), vars(program))


def kill_all_others() -> None:
    """Kill every process of the sandbox except this one and bubblewrap's init, which the program cannot signal."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.001)  # bubblewrap is about to reap those that have ended


if __name__ == "__main__":
    main()
