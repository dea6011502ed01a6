"""Sandbox script: drops all privileges, then becomes the program. Sent into the sandbox as text.

    python -c <this file> SOURCE READY USER RLIMIT_AS=536870912 RLIMIT_CORE=0 ...

SOURCE is the file descriptor of the program's text. READY is the one that receives a byte when the setup is done.
USER is the user id to switch to, or 0 to keep the current one.
"""

import builtins
import os
import resource
import sys


def main() -> None:
    """Read the program, set its resource limits, drop the remaining privileges, and run it."""
    source_file, ready, user = map(int, sys.argv[1:4])
    with os.fdopen(source_file, "rb") as file:
        source = file.read()
    for limit in sys.argv[4:]:
        name, _, wanted = limit.partition("=")
        kind = getattr(resource, name)
        allowed = resource.getrlimit(kind)[1]
        value = int(wanted) if allowed == resource.RLIM_INFINITY else min(int(wanted), allowed)
        resource.setrlimit(kind, (value, value))
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # normally added by the module `site`, which is disabled
    sys.argv[:] = ["program.py"]
    program = sys.modules["__main__"] = type(sys)("__main__")
    os.write(ready, b"1")  # an error before this byte is the sandbox's; after it, the program's
    os.close(ready)
    exec(compile(source, "program.py", "exec", dont_inherit=True), vars(program))


if __name__ == "__main__":
    main()
