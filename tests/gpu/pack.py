"""Download the wheels that a bare GPU machine lacks, in the versions of this environment, into `.whl/`.

    python tests/gpu/pack.py                                    # for Python 3.12 and CUDA 13.0
    python tests/gpu/pack.py --python 3.11 --cuda 128
    python tests/gpu/pack.py --has pyarrow,pandas,scipy         # the machine has these, too

torch, accelerate, and what they depend on must be on the machine already. bitsandbytes has a library for each version
of CUDA; only the one asked for is kept, and that for CPUs.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "grpo-ext"  # runs from the checkout
NEEDED = (PROJECT, "pytest")  # the checks share code with the tests
ON_THE_MACHINE = ("torch", "accelerate")
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_5")  # pip matches each of these exactly
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of Python on the machine; default: %(default)s")
    parser.add_argument("--cuda", default="130", help="version of CUDA of its torch; default: %(default)s, for 13.0")
    parser.add_argument(
        "--has", type=lambda text: text.split(","), default=[], help="further packages that the machine has"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".whl", help="default: .whl/ in the checkout")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    for old in options.out.glob("*.whl"):  # two versions of a package would stop the installation
        old.unlink()
    platforms = [*(f"manylinux_{version}_x86_64" for version in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.out)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    command += [f"{name}=={importlib.metadata.version(name)}" for name in missing_packages(options.python, options.has)]
    subprocess.run(command, check=True)
    (bitsandbytes,) = options.out.glob("bitsandbytes-*.whl")
    keep_one_cuda(bitsandbytes, options.cuda)
    wheels = sorted(options.out.glob("*.whl"), key=lambda wheel: wheel.stat().st_size)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / MIB:6.2f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / MIB:6.2f} MiB  in {options.out}")


def missing_packages(python: str, has: Iterable[str] = ()) -> list[str]:
    """What the kit needs in addition to torch, accelerate, and what they depend on.

    Args:
        python: version of Python on the machine.
        has: further packages that it has.
    """
    there = with_dependencies(ON_THE_MACHINE, python) | {canonicalize_name(name) for name in has} | {PROJECT}
    return sorted(with_dependencies(NEEDED, python) - there)


def with_dependencies(names: Iterable[str], python: str) -> set[str]:
    """These packages and all that they depend on, by the metadata of this environment, for Linux on x86-64. A package
    that is missing here has no dependencies."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    machine |= {"platform_system": "Linux", "platform_machine": "x86_64"}
    found: set[str] = set()
    visited: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        if str(requirement) in visited:
            continue
        visited.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        try:
            lines = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, lines):
            extras = ("", *requirement.extras)
            if needed.marker is None or any(needed.marker.evaluate(machine | {"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Remove the libraries for other accelerators from a wheel of bitsandbytes.

    Raises:
        ValueError: it has none for this version of CUDA.
    """
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source:
        libraries = {name for name in source.namelist() if re.search(r"libbitsandbytes_\w+\.so$", name)}
        kept = {name for name in libraries if re.search(rf"_(cuda{cuda}|cpu)\.so$", name)}
        if not any(f"_cuda{cuda}.so" in name for name in kept):
            versions = sorted(found[1] for name in libraries if (found := re.search(r"_cuda(\d+)", name)))
            whole.rename(wheel)
            raise ValueError(f"bitsandbytes has no library for CUDA {cuda!r}. Valid: {', '.join(versions)}.")
        removed = libraries - kept
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                if entry.filename in removed:
                    continue
                content = source.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if line.split(",")[0] not in removed).encode()
                target.writestr(entry, content, zipfile.ZIP_DEFLATED)
    whole.unlink()


if __name__ == "__main__":
    main()
