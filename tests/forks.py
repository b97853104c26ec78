"""Tests of processes that are forked to learn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from llavakit_plugins.training.forks import may_learn_in_forks


def where_forks_learn(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a new process where forks of this one could not learn: after torch.compile."""

    @wraps(test)
    def run(*values: Any, **named: Any) -> None:
        if may_learn_in_forks():
            test(*values, **named)
        elif "LLAVAKIT_NEW_PROCESS" in os.environ:
            pytest.skip("forks cannot learn on this machine")
        else:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            one = f"{test.__code__.co_filename}::{test.__name__}"
            environment = {**os.environ, "LLAVAKIT_NEW_PROCESS": "1"}
            subprocess.run([*command, one], timeout=240, check=True, env=environment)

    return run


def runs(process: int) -> bool:
    """Return whether a process is there, and no zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
