"""macOS and Windows: nothing is used at import that they lack, and files are read without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavakit import write_text
from llavakit.recipe.files import sync

ROOT = Path(__file__).parents[2]

# Libraries of others come first, as this system has them. From then on it is as poor as Windows.
IMPORT_ALL = """\
import builtins, importlib, importlib.util, os, pkgutil, sys

for name in (
    "torch", "torch.distributed.fsdp", "transformers", "timm", "PIL.Image", "rich.live", "openai",
    "onnxruntime", "onnx_ir.passes.common", "multiprocessing.pool", "asyncio", "huggingface_hub",
    "concurrent.futures.thread", "jinja2", "pydantic_settings", "filelock", "tqdm", "sentencepiece",
    "shtab", "pytest", "unittest.mock",
):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)

LACKING = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "triton")
for name in ("fork", "forkpty", "pread", "preadv", "pwrite", "posix_fadvise", "sched_getaffinity",
             "O_NONBLOCK", "O_DIRECTORY", "geteuid", "getuid", "mkfifo", "sysconf", "statvfs",
             "register_at_fork", "wait", "killpg", "uname"):
    if hasattr(os, name):
        delattr(os, name)
for name in [n for n in sys.modules if n.partition(".")[0] in LACKING]:
    del sys.modules[name]

plain = builtins.__import__
def poor(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {}).get("__name__", "").startswith("llavakit")
    if ours and level == 0 and name.partition(".")[0] in LACKING:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = poor

import llavakit, llavakit_plugins, llavakit_kernels
for package in (llavakit, llavakit_plugins, llavakit_kernels):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            print(found.name, error.name)
for name in llavakit.__all__:
    getattr(llavakit, name)
"""
KERNELS = {  # imported where a kernel runs, which is on Linux with CUDA
    "llavakit_kernels.launch", "llavakit_kernels.linear_gelu.triton",
    "llavakit_kernels.project_splice.triton", "llavakit_kernels.project_splice.triton_backward",
    "llavakit_kernels.project_splice.triton_embedding", "llavakit_kernels.tiles",
}  # fmt: skip
OPTIONAL = {"lmms_eval", "numba", "tqdm"}  # an adapter for a package that imports it itself


@pytest.mark.skipif(sys.platform != "linux", reason="a system that lacks them shows it as it is")
def test_every_module_imports_where_the_system_lacks_what_linux_has() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    failed = dict(line.split() for line in done.stdout.splitlines())
    assert {name for name, lacks in failed.items() if lacks == "triton"} == KERNELS
    others = {name: lacks for name, lacks in failed.items() if lacks != "triton"}
    assert set(others.values()) <= OPTIONAL, others


def test_files_are_read_at_an_offset_without_pread(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit import Dataset, Registry, Use

    use = Use[Dataset].model_validate(
        {"use": "conversations", "path": data / "train.json", "images": data / "images"}
    )
    expected = [sample.turns for sample in Registry.installed().build(use)]
    monkeypatch.delattr(os, "pread", raising=False)
    found = Registry.installed().build(use)
    backwards = [found[index].turns for index in reversed(range(len(found)))]
    assert backwards[::-1] == expected


def test_writes_need_no_handle_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("Windows opens no folder"))
    sync(tmp_path)
    monkeypatch.undo()
    write_text(tmp_path / "a.txt", "ü")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ü"


def test_auto_takes_mps_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from llavakit import pick_device

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))  # no Mac here
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
