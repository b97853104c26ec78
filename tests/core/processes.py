"""Runs in processes of their own that can be killed.

A fork server imports the heavy libraries once, so that a run costs a fork and not an import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

WRITES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate",
    "shutil.rmtree",
}  # fmt: skip
"""Audit events (PEP 578) of calls that change what lies on the disk."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "llavakit.engine.runner",
        "llavakit.cli",
        "llavakit_plugins.reporting.pictures",
        "llavakit_plugins.steps.train",
        "llavakit_plugins.vision.clip",
        "llavakit_plugins.language.vicuna",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
        "torch._dynamo",
        "llavakit_plugins.generation.job",
        "openai",
        "httpx_aiohttp",
    ]
)


def start(
    folder: Path, *arguments: object, kill_at: int | None = None, below: str = ""
) -> BaseProcess:
    """Start `llava-run` with these arguments; its output goes to `folder/terminal.txt`.

    With `kill_at` the process kills itself (SIGKILL) right before its so-many-th write, of those
    to paths that hold `below`.
    """
    texts = [str(argument) for argument in arguments]
    # the server's environment is that of whichever test was the first to start a process
    environment = dict(os.environ)
    process = _SERVER.Process(
        target=_run, args=(folder / "terminal.txt", texts, environment, kill_at, below)
    )
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """Return the exit code of a process; a negative one is the signal that ended it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the run does not end")
    return process.exitcode


def run(folder: Path, *arguments: object, kill_at: int | None = None, below: str = "") -> int:
    """Run to the end; return the exit code."""
    return finish(start(folder, *arguments, kill_at=kill_at, below=below))


def _run(
    output: Path,
    arguments: list[str],
    environment: dict[str, str],
    kill_at: int | None,
    below: str,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from llavakit.cli import main

    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_before_write(kill_at, below)
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill_before_write(number: int, below: str) -> None:
    count = 0

    def step(statement: str = "BEGIN") -> None:
        nonlocal count
        if statement.startswith(("BEGIN", "COMMIT", "PRAGMA journal_mode")):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
        if (opened or event in WRITES) and below in " ".join(map(str, arguments)):
            step()

    def connect(*arguments: Any, **settings: Any) -> sqlite3.Connection:
        opened: sqlite3.Connection = plain(*arguments, **settings)
        opened.set_trace_callback(step)  # what SQLite writes, no audit event tells of
        return opened

    sys.addaudithook(hook)
    plain = sqlite3.connect
    if not below:
        sqlite3.connect = connect  # type: ignore[assignment]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Put a disk of that size at `folder`; skips the test where that is not allowed."""
    import subprocess

    import pytest

    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        allowed = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
