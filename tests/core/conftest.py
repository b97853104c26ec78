"""The command line, run in the process of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest


class Outcome(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def llava_run(capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs `llava-run` with these arguments, in this process."""
    from llavakit.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def refused(llava_run: Command) -> Callable[..., str]:
    """A function that runs `llava-run`, expects exit code 2, and returns its sentence."""

    def call(*arguments: object) -> str:
        code, _, err = llava_run(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        assert "error: " in err
        return err.partition("error: ")[2].strip()

    return call
