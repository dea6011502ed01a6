"""Download the wheels that a bare GPU machine lacks, in the versions of this environment, into `.whl/`.

    python tests/gpu/pack.py                    # for Python 3.12 and CUDA 13.0
    python tests/gpu/pack.py --python 3.11 --cuda 128

torch, and what comes with it, must be on the machine already. bitsandbytes has a library for each version of CUDA;
only the one asked for is kept, and that for CPUs.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("transformers", "tokenizers", "trl", "peft", "datasets", "dill", "multiprocess", "bitsandbytes", "loky"),
    *("math-verify", "latex2sympy2-extended", "antlr4-python3-runtime", "bokeh", "xyzservices", "tornado"),
)
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_5")  # pip matches each of these exactly
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of Python on the machine; default: %(default)s")
    parser.add_argument("--cuda", default="130", help="version of CUDA of its torch; default: %(default)s, for 13.0")
    parser.add_argument("--out", type=Path, default=ROOT / ".whl", help="default: .whl/ in the checkout")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    for old in options.out.glob("*.whl"):  # two versions of a package would stop the installation
        old.unlink()
    platforms = [*(f"manylinux_{version}_x86_64" for version in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.out)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    command += [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    subprocess.run(command, check=True)
    (bitsandbytes,) = options.out.glob("bitsandbytes-*.whl")
    keep_one_cuda(bitsandbytes, options.cuda)
    wheels = sorted(options.out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / MIB:6.2f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / MIB:6.2f} MiB  in {options.out}")


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
