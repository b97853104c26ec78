"""Entry points are read once, and again when packages have changed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from llavakit.registry.entry_points import entry_points


def test_packages_are_read_again_once_one_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert not entry_points(group="made.meanwhile")
    written = tmp_path / "meanwhile-1.0.dist-info"
    written.mkdir()
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: meanwhile\nVersion: 1.0\n")
    (written / "entry_points.txt").write_text("[made.meanwhile]\nfirst = json:dumps\n")
    assert entry_points(group="made.meanwhile").names == {"first"}
    monkeypatch.setattr(metadata, "distributions", None)  # nobody looks at packages again
    assert entry_points(group="made.meanwhile", name="first").names == {"first"}
