"""A package's command that is broken is left out, and told; the others go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command

from llavakit.cli import main

Install = Callable[[str | None], None]

BODIES = {
    "raises": ("    raise ValueError('no such thing')", "cannot add its command `mine`: no such"),
    "exits": ("    import sys; sys.exit(0)", "cannot add its command `mine`: it calls sys.exit(0)"),
    "percent": (
        "    commands.add_parser('mine', help='all 100% of it')",
        "cannot add its command `mine`: ",
    ),
    "percent of a flag": (
        "    commands.add_parser('mine').add_argument('--half', help='50%')",
        "cannot add its command `mine`: ",
    ),
    "two flags": (
        "    p = commands.add_parser('mine')\n    p.add_argument('-h', '--height')",
        "cannot add its command `mine`: argument -h/--height: conflicting option string",
    ),
    "another's name": (
        "    commands.add_parser('chat')",
        "command `mine` of llava-cmd adds chat; let it add one of its own name",
    ),
    "an alias": (
        "    commands.add_parser('mine', aliases=['serve'])",
        "command `mine` of llava-cmd adds mine, serve; let it add one of its own name",
    ),
    "nothing": ("    pass", "command `mine` of llava-cmd adds none; let it add one"),
    "no function": (None, "cannot add its command `mine`: "),
}


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Install:
    """A function that installs a package with the command `mine`, which has this body."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str | None) -> None:
        module = f"llava_cmd_{abs(hash(body))}"
        request.addfinalizer(lambda: sys.modules.pop(module, None))
        text = "add = 3\n" if body is None else f"def add(commands):\n{body}\n"
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / "llava_cmd-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-cmd\nVersion: 1.2\n")
        entry = f"[llavakit.commands]\nmine = {module}:add\n"
        (info / "entry_points.txt").write_text(entry)

    return write


@pytest.mark.parametrize(("body", "sentence"), BODIES.values(), ids=BODIES)
def test_the_others_go_on_and_it_is_told(
    body: str | None, sentence: str, install: Install, llava_run: Command
) -> None:
    install(body)
    code, out, _ = llava_run()  # the help
    assert code == 0
    assert sentence in " ".join(out.split())
    assert "check-data" in out
    code, out, _ = llava_run("completion", "bash")
    assert code == 0
    assert "llava-run" in out
    code, _, err = llava_run("mine")
    assert code == 2
    assert err.startswith("error: ")
    assert sentence in err
    assert "Traceback" not in err
    (broken,) = json.loads(llava_run("plugins", "--json").out)["broken"]
    assert (broken["name"], broken["package"], broken["version"]) == ("mine", "llava-cmd", "1.2")
    assert sentence in broken["error"]


def test_a_traceback_drives_no_terminal(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "    def fails(arguments):\n        raise ValueError('\\x1b[2J\\x07 gone')\n"
        "    commands.add_parser('mine').set_defaults(command=fails)"
    )
    monkeypatch.setattr(sys, "argv", ["llava-run", "mine"])
    assert main() == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ValueError: \\x1b[2J\\x07 gone" in err
    assert "\x1b" not in err
