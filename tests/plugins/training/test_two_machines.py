"""A run over two machines, one of which dies: network namespaces joined by a pair of interfaces.

Each is a machine to torchrun: an address of its own, and nothing reachable but the other's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RecipeWriter
from tests.core import processes
from tests.plugins.training.test_sharded import events, losses, same, sets
from tests.plugins.training.test_sharded_checkpoints import GENTLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="`ip` (iproute2) is not installed"),
]
PORT = 29400
HELD = """\
import os, sys, time
from pathlib import Path
from llavakit.cli import main
from llavakit_plugins.training.loop import Trainer

step, mark = Trainer._step, Path(os.environ["MARK"])

def taken(self, *given):
    if os.environ["RANK"] == "1" and self.progress.step == 4 and not mark.exists():
        mark.write_text("")
        time.sleep(600)  # the machine is switched off now
    return step(self, *given)

Trainer._step = taken
sys.exit(main(sys.argv[1:]))
"""


class Machine:
    """A network namespace with one interface, and what was started there."""

    def __init__(self, name: str, interface: str, address: str) -> None:
        self.name, self.interface, self.address = name, interface, address
        self.started: list[subprocess.Popen[bytes]] = []

    def set_up(self) -> None:
        ip("link", "set", self.interface, "netns", self.name)
        self.ip("addr", "add", f"{self.address}/24", "dev", self.interface)
        for interface in ("lo", self.interface):
            self.ip("link", "set", interface, "up")

    def ip(self, *words: str) -> None:
        ip("-n", self.name, *words)

    def start(self, terminal: Path, *command: object, **environment: str) -> None:
        own = ["ip", "netns", "exec", self.name, *map(str, command)]
        with terminal.open("ab") as file:
            self.started.append(
                subprocess.Popen(
                    own, env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": self.interface},
                    stdout=file, stderr=file, start_new_session=True,
                )
            )  # fmt: skip

    def switch_off(self) -> None:
        """End everything at once, with no word to the other machine."""
        self.ip("link", "set", self.interface, "down")
        self.kill()
        self.ip("link", "set", self.interface, "up")

    def kill(self) -> None:
        # torchrun starts its workers in sessions of their own: all that is here is asked for
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait(30)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other and nothing else. Skips where only root may make them."""
    own = os.getpid()
    names, interfaces = (f"llk{own}a", f"llk{own}b"), (f"lk{own}a", f"lk{own}b")
    first, second = (
        Machine(name, interface, f"10.213.77.{number}")
        for number, (name, interface) in enumerate(zip(names, interfaces, strict=True), start=1)
    )
    with contextlib.ExitStack() as stack:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
            if made.returncode:
                pytest.skip(f"only root may make network namespaces: {made.stderr.decode()}")
            stack.callback(ip, "netns", "del", name)
        try:
            ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no pair of interfaces can be made here: {error.stderr.decode()}")
        for machine in (first, second):
            machine.set_up()
            stack.callback(machine.kill)
        yield first, second


def test_a_machine_is_switched_off_and_comes_back(
    machines: tuple[Machine, Machine], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """The command is the one that docs/scale.md gives; both machines see the folder of the run."""
    first, second = machines
    arguments = (write_recipe(), *sets(**GENTLE, **{"steps.finetune.timeout": "0.2"}))
    program, mark, run = tmp_path / "held.py", tmp_path / "mark", tmp_path / "run"
    program.write_text(HELD)
    terminals = [tmp_path / "first.txt", tmp_path / "second.txt"]

    def start(number: int) -> None:
        machine = machines[number]
        machine.start(
            terminals[number], sys.executable, "-m", "torch.distributed.run",
            "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:{PORT}",
            "--rdzv-id", "run1", "--local-addr", machine.address,
            # a name of the host, by which torchrun knows who keeps the store, they have in common
            "--rdzv-conf", f"is_host={number == 0},read_timeout=60",
            program, *arguments, "--out", run, "--resume",
            MARK=str(mark), OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    def said() -> str:
        return "\n".join(path.read_text()[-8000:] for path in terminals if path.exists())

    start(0)
    start(1)
    until = time.monotonic() + 240
    # both are in the fifth step, and what was kept of the fourth is whole
    while not (mark.exists() and list(run.rglob("step-000004"))):
        assert time.monotonic() < until, said()
        assert all(m.started[0].poll() is None for m in machines), said()
        time.sleep(0.2)
    second.switch_off()
    time.sleep(1)
    start(1)
    assert first.started[0].wait(240) == 0, said()
    assert second.started[1].wait(60) == 0, said()
    assert [event["at"] for event in events(run, "resumed")] == [4], said()

    # as two processes of one machine that nothing happens to
    whole = tmp_path / "whole"
    ended = processes.run_ranks(tmp_path, 2, *arguments, "--out", whole)
    assert ended.code == 0, ended.said
    assert losses(run)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-6)
    same(whole / "model", run / "model", atol=1e-6)
