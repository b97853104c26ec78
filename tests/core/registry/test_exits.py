"""A plugin that calls sys.exit ends nothing in silence, and names itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.core.registry.test_registry import distribution, plugin_with

from llavakit import Connector, PluginError, Registry, Tracker, Use
from llavakit.engine.events import EventLog
from llavakit_plugins.connectors.mlp import Linear

STEPS = """\
import sys
from llavakit import Options, Outcome, Step, hookimpl

class Quits(Step):
    name = "quits"
    def run(self, run):
        sys.exit(0)

class Plans(Step):
    name = "plans"
    @classmethod
    def plan(cls, options, planner):
        sys.exit(0)
    def run(self, run):
        return Outcome({})

@hookimpl
def llava_steps():
    return [Quits, Plans]
"""


@pytest.mark.parametrize("code", ["0", "", "3", "'a text'"])
def test_at_import_it_is_a_broken_plugin(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava_run: Command
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "llava-quits", "llava_quits", f"import sys\nsys.exit({code})\n")
    monkeypatch.delitem(sys.modules, "llava_quits", raising=False)
    done, out, _ = llava_run("plugins")
    assert done == 0
    assert "clip" in out
    assert "of llava-quits failed to import: it calls sys.exit(" in out
    assert f"({tmp_path / 'llava_quits.py'}, line 2)" in out


@pytest.mark.parametrize("name", ["quits", "plans"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_is_named(
    watched: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava_run: Command
) -> None:
    if watched:  # as wandb does, to know how a program ended
        before = sys.exit

        def exit(code: Any = 0) -> None:
            before(code)

        monkeypatch.setattr(sys, "exit", exit)
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "llava-steps", "llava_steps_that_exit", STEPS)
    monkeypatch.delitem(sys.modules, "llava_steps_that_exit", raising=False)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'steps = [{{ use = "{name}" }}]')
    code, _, err = llava_run(recipe, "--out", tmp_path / "run")
    assert code == 2
    line = {"quits": 7, "plans": 13}[name]
    whose = {"quits": "step `quits`", "plans": str(recipe)}[name]
    place = f"({tmp_path / 'llava_steps_that_exit.py'}, line {line})"
    assert f"error: {whose} cannot go on: it calls sys.exit(0) {place}; raise an error" in err


def test_a_component_is_named() -> None:
    class Quits(Linear):
        name = "quits"

        def __init__(self, options: Any, **widths: int) -> None:
            sys.exit(0)

    registry = Registry.empty()
    registry.register(plugin_with(Quits), name="mine")
    with pytest.raises(PluginError, match=r"Quits cannot go on: it calls sys.exit\(0\)"):
        registry.build(Use[Connector](use="quits"), vision_width=1, language_width=1)


class Quitting(Tracker):
    name = "quitting"

    def record(self, event: Mapping[str, Any]) -> None:
        sys.exit(0)


class Changing(Tracker):
    name = "changing"

    def record(self, event: Mapping[str, Any]) -> None:
        assert isinstance(event, dict)
        event["answers"].clear()
        event.clear()


class Noting(Tracker):
    name = "noting"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mapping[str, Any]] = []

    def record(self, event: Mapping[str, Any]) -> None:
        self.seen.append(event)


def test_a_tracker_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noting = Noting()
    with caplog.at_level(logging.WARNING, "llavakit"):
        log = EventLog(tmp_path, [Quitting(), noting])
        log("done")
        log.close()
    assert "tracker `quitting` failed; it sees nothing more of this run" in caplog.text
    assert len(noting.seen) == 1


def test_a_tracker_that_changes_an_event_changes_its_own(tmp_path: Path) -> None:
    noting = Noting()
    log = EventLog(tmp_path, [Changing(), noting])
    log("done", answers=[1, 2])  # waits until all have seen it
    log("done", answers=[3])
    log.close()
    assert [event["answers"] for event in noting.seen] == [[1, 2], [3]]
