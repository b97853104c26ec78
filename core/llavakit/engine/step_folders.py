"""The folders of steps: what was done in them, what is to be done again, what is set aside."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from llavakit.contracts.errors import RecipeError, and_more
from llavakit.engine.progress import say
from llavakit.engine.reuse import STEP_DONE, Record, record_changes
from llavakit.recipe.files import explain_write, fingerprint, write_text
from llavakit.recipe.model_choice import MANIFEST
from llavakit.recipe.recipe import Recipe
from llavakit.recipe.redaction import redacted
from llavakit.registry import texts_in

_OF_MODELS = (MANIFEST, "config.json", "adapter_config.json")
_KINDS = (".json", ".toml", ".safetensors", ".bin", ".model", ".txt")  # of a model's files
_BEGUN = "begun.json"  # there before the step does anything, with what it is to do


def record_of(recipe: Recipe, until: str) -> Record:
    """Return everything that decides what a step's folder holds. Hashes the data it names."""
    model = None if recipe.model is None else recipe.model.model_dump(mode="json")
    steps, named, files = list[Any](), list[Any]([model]), dict[str, str]()
    for name, use in recipe.active_steps():
        steps.append(use.model_dump(mode="json"))
        named.append(use.options)
        if name == until:
            break
    for path in (path for text in dict.fromkeys(texts_in(named)) for path in _files_at(text)):
        state = os.stat(path)
        files[path] = _fingerprint(Path(path), state.st_size, state.st_mtime_ns)
    record = {"model": model, "seed": recipe.seed, "steps": steps, "files": files}
    return dict(redacted(json.loads(json.dumps(record))))  # tuples become lists, as in the file


def _files_at(text: str) -> Iterator[str]:
    """Yield the file that an option names, or those of the model in the folder that it names."""
    if os.path.isfile(text):  # False for what no path can be, too
        yield text
    elif text and any(os.path.isfile(os.path.join(text, name)) for name in _OF_MODELS):
        found = (path for path in sorted(Path(text).rglob("*.*")) if path.suffix in _KINDS)
        yield from (str(path) for path in found if path.is_file())


@lru_cache(maxsize=256)  # every step's record has the data of the steps before it
def _fingerprint(path: Path, size: int, modified: int) -> str:
    return fingerprint(path)


def read_done(folder: Path, name: str = STEP_DONE) -> dict[str, Any] | None:
    """Return what a step said when it was done, and of what `record`; None where it was not."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("record"), dict):
            raise ValueError("it holds no record")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged ({error}); move its folder away and rerun") from error
    return value


def prepare(folder: Path, record: Record, *, resume: bool) -> bool:
    """Make the step's folder ready; return whether to go on from what it holds."""
    begun = read_done(folder, _BEGUN)
    if begun is not None and begun["record"] == record and not (folder / STEP_DONE).exists():
        if resume:
            say(f"{folder.name}: going on where it was interrupted")
            return True
        aside = set_aside(folder)
        say(f"{folder.name}: starts over; the interrupted attempt is in {aside} (--resume goes on)")
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        aside = set_aside(folder)
        what = f" ({and_more(record_changes(begun['record'], record))})" if begun else ""
        same = begun and {**begun["record"], "files": {}} == {**record, "files": {}}
        whose = "its data" if same else "the recipe"
        say(f"{folder.name}: {whose} changed{what}, so it is done again; the old one is in {aside}")
    with explain_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _BEGUN, json.dumps({"record": record}))
    return False


def set_aside(folder: Path) -> Path:
    """Move a folder out of the way: nothing that was paid for with time or money is deleted."""
    attic = folder.parent / "superseded"
    with explain_write(attic):
        attic.mkdir(exist_ok=True)
        numbers = (attic / f"{folder.name}.{number}" for number in range(1, sys.maxsize))
        aside = next(path for path in numbers if not path.exists())
        folder.rename(aside)
    return aside


@contextmanager
def none_half_begun(folder: Path) -> Iterator[None]:
    """Remove the folder of a step that failed before it left anything."""
    try:
        yield
    except Exception:
        if all(item.name == _BEGUN for item in folder.iterdir()):
            shutil.rmtree(folder)
        raise
