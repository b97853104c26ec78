"""Gathers what a machine with a GPU and no network lacks, as wheels in one folder.

    python tests/benchmarks/gpu_wheels.py [FOLDER] [--python 3.12] [--cuda 13.0]

The machine has torch, transformers, timm and peft; NEEDED is what else llavakit and its benchmarks
on a GPU want. There, `pip install --no-index --no-deps --target SITE FOLDER/*.whl` installs it.
FOLDER is `.wheels` by default, which git ignores; what it held is replaced.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
NEEDED = (
    "pydantic", "pydantic-core", "pydantic-settings", "python-dotenv", "typing-inspection",
    "annotated-types", "typing-extensions", "tomli-w", "shtab", "lazy-loader",
    "liger-kernel", "bitsandbytes",
)  # fmt: skip
MOST = 40e6  # bytes: they travel with everything else


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=REPOSITORY / ".wheels")
    parser.add_argument("--python", default="3.12", help="the machine's version of Python")
    parser.add_argument("--cuda", default="13.0", help="the machine's version of CUDA")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    own = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(options.folder)]
    subprocess.run([*own, str(REPOSITORY)], check=True)
    # pydantic says in its metadata which pydantic-core it takes: both are resolved together
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(options.folder)]
    command += ["--python-version", options.python, "--implementation", "cp"]
    for libc in (17, 24, 27, 28, 31, 34):
        command += ["--platform", f"manylinux_2_{libc}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64"]
    subprocess.run([*command, *(name for name in NEEDED if name != "pydantic-core")], check=True)
    core = _requirement(next(options.folder.glob("pydantic-2*.whl")), "pydantic-core")
    subprocess.run([*command, core], check=True)
    for wheel in options.folder.glob("bitsandbytes-*.whl"):
        _keep_library(wheel, "cuda" + options.cuda.replace(".", ""))
    size = sum(wheel.stat().st_size for wheel in options.folder.iterdir())
    for wheel in sorted(options.folder.iterdir()):
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{size / 1e6:7.2f} MB in {options.folder}")
    if size > MOST:
        print(f"more than {MOST / 1e6:.0f} MB: leave something out of NEEDED", file=sys.stderr)
        return 1
    return 0


def _requirement(wheel: Path, name: str) -> str:
    """Return what a wheel says of one of its dependencies, such as `pydantic-core==2.41.5`."""
    with zipfile.ZipFile(wheel) as archive:
        inside = next(path for path in archive.namelist() if path.endswith("/METADATA"))
        metadata = archive.read(inside).decode()
    found = re.search(rf"^Requires-Dist: ({name}\s*==\s*[\w.]+)", metadata, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{wheel.name} does not name its version of {name}")
    return found[1].replace(" ", "")


def _keep_library(wheel: Path, kept: str) -> None:
    """Take out of bitsandbytes the libraries for other versions of CUDA, nine tenths of it."""
    part = wheel.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as smaller,
    ):
        others = {
            path
            for path in whole.namelist()
            if re.search(r"/libbitsandbytes_\w+\.so$", path)
            and not path.endswith((f"_{kept}.so", "_cpu.so"))
        }
        for path in whole.namelist():
            if path in others:
                continue
            content = whole.read(path)
            if path.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(x for x in lines if x.partition(",")[0] not in others).encode()
            smaller.writestr(whole.getinfo(path), content)
    part.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
