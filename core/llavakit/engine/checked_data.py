"""Builds the data sets of a recipe before its first step, so that none fails hours later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from llavakit.contracts.component import Use
from llavakit.contracts.interfaces import Dataset
from llavakit.engine.progress import say, show_if_slow
from llavakit.engine.step_folders import read_done, record_of
from llavakit.recipe.check import parts
from llavakit.recipe.recipe import Recipe
from llavakit.registry import KindT, Registry, StepFolders, kind_of, texts_in


def check_data(recipe: Recipe, registry: Registry, directory: Path, since: int = 0) -> CheckedData:
    """Build every data set that is there already, of the steps that are to be done.

    Not what was checked before, at the time `since` in nanoseconds, and has not changed.
    """
    checked = CheckedData(registry)
    for name, use in recipe.active_steps():
        done = read_done(directory / name)
        if done is None or done["record"] != record_of(recipe, name):
            for data in _data_sets(use, registry):
                if since and all(time < since for _, time in _stamps(data.options).values()):
                    continue
                with show_if_slow(f"{name}: checking its data") as progress:
                    built = registry.build(data, progress=progress)
                for note in built.notes():
                    say(f"{name}: {note}")
                checked.keep(data, built)
    return checked


class CheckedData:
    """Builds components; a data set that was built to check it is not built again.

    Each is handed out once, so that none outlives its step, and only while its files are the same.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: dict[str, tuple[Any, Dataset]] = {}

    def keep(self, use: Use[Dataset], data: Dataset) -> None:
        self._kept[use.model_dump_json()] = (_stamps(use.options), data)

    def build(self, use: Use[KindT], /, steps: StepFolders | None = None, **context: Any) -> KindT:
        stamps, data = self._kept.pop(use.model_dump_json(), (None, None))
        if isinstance(data, kind_of(use)) and stamps == _stamps(use.options):
            return cast("KindT", data)
        return self._registry.build(use, steps=steps, **context)


def _stamps(options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file and folder that options name."""
    found = {}
    for text in texts_in(options):
        with suppress(OSError, ValueError):  # most texts are no paths
            state = Path(text).stat()
            found[text] = (state.st_size, state.st_mtime_ns)
    return found


def _data_sets(value: object, registry: Registry) -> Iterator[Use[Dataset]]:
    """Yield the data sets that a step chooses and that no earlier step has to make."""
    if not isinstance(value, Use):
        for _, part in parts(value):
            yield from _data_sets(part, registry)
    elif not issubclass(kind_of(value), Dataset):
        yield from _data_sets(registry.options(value), registry)
    elif not any(text.startswith("@") for text in texts_in(value.options)):
        yield value
