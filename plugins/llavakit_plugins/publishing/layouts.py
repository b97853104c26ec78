"""The folder that is sent: a model in the layouts that were asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llavakit import Exporter, LlavaModel, ModelError, peek_json, write_text

_MARK, _UPLOAD = "llavakit-push.json", "upload"


def open_staging(folder: Path, content: Mapping[str, Any]) -> Path:
    """Return where in `folder` files are laid out: what an attempt with the same `content` left.

    `content` is all that decides on the files. Raises ModelError for a folder that holds anything
    else than what a push laid out: nothing of it may be sent or removed.
    """
    upload = folder / _UPLOAD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = peek_json(folder / _MARK)
        ours = {*_names(_MARK), *(_names(_UPLOAD) if known else ())}
        if {item.name for item in folder.iterdir()} - ours:
            raise ModelError(
                f"{folder} holds what no push has laid out; let --staging name a folder that is "
                "empty or not there"
            )
        if known == content:
            return upload
        if upload.exists():
            shutil.rmtree(upload)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"{folder} cannot hold what is sent: {reason}; name another") from error
    write_text(folder / _MARK, json.dumps(content))
    return upload


def close_staging(folder: Path) -> None:
    """Remove what was laid out, and the folder."""
    for name in _names(_UPLOAD):
        shutil.rmtree(folder / name, ignore_errors=True)
    with suppress(OSError):
        for name in _names(_MARK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _names(name: str) -> tuple[str, ...]:
    """Return a name, and those beside it of what a killed process had half written."""
    return name, f".{name}.partial", f".{name}.old"


def lay_out(model: LlavaModel, exporters: Sequence[Exporter], folder: Path) -> dict[str, str]:
    """Write the first layout to `folder` itself, each other one to a folder of its name in it.

    What an attempt before this one has written is kept: each layout is whole or not there.
    Returns the folder of each layout within `folder`, "" for itself.
    """
    merged, layouts = None, dict[str, str]()
    for number, exporter in enumerate(exporters):
        layouts[exporter.name] = exporter.name if number else ""
        place = folder / layouts[exporter.name]
        if not place.exists():
            merged = model.merged() if merged is None else merged
            exporter.export(merged, place)
    return layouts
