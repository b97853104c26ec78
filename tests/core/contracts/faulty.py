"""Runs one check of a contract against a component, as pytest would."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest


def run_check(
    contract: type[Any], build: Callable[[], Any], test: str, folder: Path, **more: Any
) -> None:
    """Run the test of the contract that `test` names, with a component that `build` gives."""
    instance = type("Planted", (contract,), {"build": lambda self: build(), **more})()
    (name,) = [name for name in dir(instance) if name.startswith("test_") and test in name]
    check = getattr(instance, name)
    folder.mkdir(exist_ok=True)
    check(**({"tmp_path": folder} if "tmp_path" in signature(check).parameters else {}))


def caught(
    contract: type[Any],
    build: Callable[[], Any],
    test: str,
    folder: Path,
    said: str,
    **more: Any,
) -> None:
    """Assert that the check fails, and says what was promised, what came and what to change."""
    with pytest.raises(AssertionError) as failure:
        run_check(contract, build, test, folder, **more)
    text = str(failure.value)
    parts = [text.find(part) for part in ("promised: ", "came: ", "change: ")]
    assert -1 < parts[0] < parts[1] < parts[2], text
    assert said in text, text
