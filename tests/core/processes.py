"""Runs in processes of their own that can be killed.

A fork server imports the heavy libraries once, so that a run costs a fork and not an import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

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
        "torch.distributed.fsdp",
        "llavakit_plugins.training.sharded_checkpoints",
        "llavakit_plugins.generation.job",
        "openai",
        "httpx_aiohttp",
    ]
)


Program = Callable[[list[str]], int | None]
"""What a process runs in the place of the command; it must be a function of a module."""


def start(
    folder: Path,
    *arguments: object,
    kill_at: int | None = None,
    below: str = "",
    program: Program | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start `llava-run` with these arguments; its output goes to `folder/terminal.txt`.

    With `kill_at` the process kills itself (SIGKILL) right before its so-many-th write, of those
    to paths that hold `below`. `environment` is set besides this process's.
    """
    texts = [str(argument) for argument in arguments]
    # the server's environment is that of whichever test was the first to start a process
    whole = {**os.environ, **(environment or {})}
    process = _SERVER.Process(
        target=_run, args=(folder / "terminal.txt", texts, whole, kill_at, below, program)
    )
    process.start()
    return process


class Ended(NamedTuple):
    """How processes ended that ran together."""

    code: int
    """0, or that of the first process that failed."""
    said: str
    """All that they wrote to the terminal."""


def run_ranks(
    folder: Path,
    number: int,
    *arguments: object,
    restarts: int = 0,
    program: Program | None = None,
) -> Ended:
    """Run so many processes of one run, as torchrun would, but each at the cost of a fork.

    As with torchrun, one that fails ends the others, and then all start again, up to `restarts`
    times.
    """
    terminal = folder / "terminal.txt"
    before = terminal.stat().st_size if terminal.exists() else 0
    for attempt in range(restarts + 1):
        together = {
            "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_PORT": free_port(),
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        processes = []
        for rank in map(str, range(number)):
            own = {**together, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(start(folder, *arguments, program=program, environment=own))
        code = _first_failure(processes)
        if code == 0:
            break
    return Ended(code, terminal.read_bytes()[before:].decode())


def free_port() -> str:
    """Return a port that nothing listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def _first_failure(processes: Sequence[BaseProcess], seconds: float = 240) -> int:
    """Wait for all processes, or for the first that fails, which ends the others."""
    running = {process.sentinel: process for process in processes}
    code = 0
    while running and code == 0:
        ended = wait(list(running), seconds)
        for process in [running.pop(sentinel) for sentinel in ended if isinstance(sentinel, int)]:
            process.join()
            code = code or process.exitcode or 0
        if not ended:
            code = -signal.SIGALRM
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.join(30)
        process.kill()
        process.join()
    return code


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
    program: Program | None,
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
        code = (program or main)(arguments) or 0
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
