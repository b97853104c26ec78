"""Trackers that hang, fail or are slow: the run neither waits for them nor ends with them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from tests.conftest import RecipeWriter

from llavakit import LlavaError, Options, Recipe, Registry, Tracker, hookimpl
from llavakit.engine import events
from llavakit.engine.events import EventLog


class Stuck(Tracker):
    """Hangs in one of its calls until it is let go."""

    name = "stuck"

    def __init__(self, where: str) -> None:
        super().__init__(Options())
        self.where, self.go, self.seen = where, Event(), list[str]()

    def _call(self, name: str) -> None:
        self.seen.append(name)
        if name == self.where:
            self.go.wait()

    def begin(self, directory: Path) -> None:
        self._call("begin")

    def record(self, event: Mapping[str, Any]) -> None:
        self._call(str(event["event"]))

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("where", ["begin", "train", "done", "close"])
def test_one_that_hangs_is_left_behind_and_the_others_see_everything(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(events, "_PATIENCE", 0.3)
    monkeypatch.setattr(events, "_MOMENT", 0.2)
    stuck, sound = Stuck(where), Stuck("never")
    log = EventLog(tmp_path, [stuck, sound])
    with caplog.at_level(logging.WARNING, "llavakit"):
        for number in range(50):
            log("train", at=number)
        log("done")
        log.close()
    assert sound.seen == ["begin", *["train"] * 50, "done", "close"]
    assert "tracker `stuck` hangs; the run ends without it" in caplog.text
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 51
    assert stuck.seen[-1] == where
    stuck.go.set()


def test_what_waits_for_one_that_hangs_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "_MOST_WAITING", 10)
    monkeypatch.setattr(events, "_PATIENCE", 0.2)
    stuck = Stuck("begin")
    log = EventLog(tmp_path, [stuck])
    with caplog.at_level(logging.WARNING, "llavakit"):
        for number in range(100):
            log("train", at=number)
    assert caplog.text.count("hangs or is too slow; it misses events") == 1
    stuck.go.set()
    log.close()
    assert stuck.seen.count("train") <= 10
    assert stuck.seen[-1] == "close"


def test_one_that_is_slow_but_moves_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_PATIENCE", 0.5)

    class Slow(Stuck):
        def record(self, event: Mapping[str, Any]) -> None:
            time.sleep(0.02)
            super().record(event)

    slow = Slow("never")
    log = EventLog(tmp_path, [slow])
    for number in range(50):  # together twice as long as its patience
        log("train", at=number)
    log.close()
    assert slow.seen == ["begin", *["train"] * 50, "close"]


@pytest.mark.parametrize("where", ["begin", "record", "close"])
def test_one_that_fails_is_told_nothing_more(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Stuck):
        def _call(self, name: str) -> None:
            super()._call(name)
            if where == ("record" if name == "train" else name):
                raise LlavaError("the disk is full")

    failing = Failing("never")
    log = EventLog(tmp_path, [failing])
    with caplog.at_level(logging.WARNING, "llavakit"):
        log("train", at=1)
        log("train", at=2)
        log.close()
    assert "tracker `stuck` failed (the disk is full)" in caplog.text
    count = {"begin": 1, "record": 2, "close": 4}[where]
    assert failing.seen == ["begin", "train", "train", "close"][:count]


HANGS = """\
import atexit, os, sys, time
from pathlib import Path
from llavakit import Registry, Tracker, hookimpl
from llavakit.engine import events

class Hangs(Tracker):
    name = "hangs"
    def record(self, event):
        time.sleep(3600)

class Plugin:
    @hookimpl
    def llava_trackers(self):
        return [Hangs]

def installed(cls, plain=Registry.installed.__func__):
    registry = plain(cls)
    registry.register(Plugin())
    return registry

atexit.register(time.sleep, 3600)  # as a service's library waits for its uploads
Registry.installed = classmethod(installed)
events._PATIENCE = events._MOMENT = 0.5
from llavakit.cli import main
sys.exit(main())
"""


def test_a_run_whose_tracker_hangs_ends_with_its_results(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe(('name = "small"', 'name = "small"\ntrackers = ["hangs", "report"]'))
    out = tmp_path / "run"
    command = [sys.executable, "-c", HANGS, str(path), "--out", str(out)]
    more = ["--set", "steps.pretrain.max_steps=1", "--set", "steps.2.skip=true"]
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tracker `hangs` hangs; the run ends without it" in done.stderr
    assert "small: done, see" in done.stdout
    assert json.loads((out / "01-pretrain" / "artifact.json").read_text())["metrics"]["steps"] == 1
    assert (out / "report.html").is_file()


def test_trackers_may_be_named_alone(write_recipe: RecipeWriter) -> None:
    class Plugin:
        @hookimpl
        def llava_trackers(self) -> list[type[Tracker]]:
            return [Stuck]

    registry = Registry.installed()
    registry.register(Plugin())
    path = write_recipe(("seed = 0", 'seed = 0\ntrackers = ["stuck", { use = "report" }]'))
    recipe = Recipe.load(path, registry)
    assert [use.use for use in recipe.trackers] == ["stuck", "report"]
    with pytest.raises(LlavaError, match=r"no Tracker is called `stick`; did you mean `stuck`"):
        Recipe.load(path, registry, ['trackers=["stick"]'])
    assert not [t for t in _alive() if t.name == "tracker report"], "loading starts nothing"


def _alive() -> list[Thread]:
    import threading

    return threading.enumerate()
