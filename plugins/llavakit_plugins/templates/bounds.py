"""Tries every rendering of a foreign chat template in a separate process, within limits.

A template is a program: it may loop for ever, or write more than fits into memory, for one text and
not for another, and Jinja's sandbox does not prevent that. One process tries the renderings of a
program, one after another, which takes less than 0.1 ms for each.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

from llavakit import ModelError

TEMPLATE_FAULTS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
"""What a template raises besides Jinja's own errors."""
# Far above what real templates need, and small enough for a server to survive a bad one.
_SECONDS, _BYTES, _CHARACTERS = 5, 1 << 30, 10_000_000
_WAIT = 120  # for a machine that is busy with other things


def check_bounds(
    source: str, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ModelError for a chat template that does not end, or writes without end.

    Tried is the rendering of `messages`; `variables` are what else the template reads.
    """
    refusal = _renderer(os.getpid()).refusal(source, variables, messages)
    if refusal is not None:
        raise ModelError(
            f"the chat template that came with the tokenizer {refusal}; choose another prompt "
            "template with --template, such as vicuna_v1"
        )


@cache
def _renderer(process: int) -> _Renderer:
    """Return the renderer of this process: a forked one shares no pipe with its parent."""
    renderer = _Renderer()
    atexit.register(renderer.stop)
    return renderer


class _Renderer:
    """A process that runs `bounded_renderer.py`, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}

    def refusal(
        self, source: str, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """Return what is wrong with a rendering, or None."""
        with self._lock:
            task: dict[str, Any] = {"variables": {**variables}, "messages": messages}
            if self._process is None:
                self._known = {}
                self._process = self._started()
            if source not in self._known:
                self._known[source] = len(self._known)
                task["source"] = source
            task["template"] = self._known[source]
            said = self._exchange(json.dumps(task, default=str).encode() + b"\n")
            if said is None:  # stopped by the system for its time or memory, or still at it
                self.stop()
                return f"does not end within {_SECONDS} seconds"
            return cast("str | None", json.loads(said))

    def _started(self) -> subprocess.Popen[bytes]:
        program = Path(__file__).with_name("bounded_renderer.py")
        limits = map(str, (_SECONDS, _BYTES, _CHARACTERS))
        return subprocess.Popen(
            # -I: neither the working folder nor environment
            # variables may add modules to this process
            [sys.executable, "-I", str(program), *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _exchange(self, line: bytes) -> bytes | None:
        """Return the answer to a line; None where there is none."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        output = self._process.stdout.fileno()
        # not `readline`: the process's limit counts its own computing time only, and this wait has
        # to end even where it gets none
        waiting, said = select.poll(), b""
        waiting.register(output, select.POLLIN)
        while not said.endswith(b"\n"):
            piece = os.read(output, 1 << 16) if waiting.poll(1000 * _WAIT) else b""
            if not piece:
                return None
            said += piece
        return said

    def stop(self) -> None:
        """End the process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError):
                process.__exit__(None, None, None)  # closes its pipes and waits for it
