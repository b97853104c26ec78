"""Runs the steps of a recipe, one after another, and skips those that are already done."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import torch
from pydantic import BaseModel

from llavakit.assembly import create_model, is_model, load_model, without_none
from llavakit.components import Use
from llavakit.errors import RecipeError
from llavakit.events import EventLog
from llavakit.files import HASHED_BYTES, digest, explain_write, write_text
from llavakit.interfaces import Dataset, LanguageModel, Run, Stopped, VisionEncoder
from llavakit.loading import pick_device
from llavakit.model import LlavaModel
from llavakit.planning import make_plan
from llavakit.progress import duration, show_progress
from llavakit.recipe import Recipe
from llavakit.registry import Registry
from llavakit.reporting import StepRecord, write_report

_DONE = "artifact.json"
_BEGUN = "begun.json"
_LONGEST_PATH = 1024
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run left."""

    folders: Mapping[str, Path]
    report: Path


def run(recipe: Recipe, registry: Registry, directory: Path, *, resume: bool = False) -> Result:
    """Run every step; return the folder of each, by name.

    A step is skipped when its folder holds the record of the same model and the same steps up to
    and including it. From the first step that differs on, old folders are set aside.

    Raises LlavaError for what the user can mend, and Stopped after an interrupt.
    """
    device = pick_device(recipe.device)
    plan = make_plan(recipe, registry)
    _check_data(recipe, registry, directory)
    with explain_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _one_run_at_a_time(directory), _interrupts() as stopping:
        _write_facts(recipe, device, directory)
        write_text(directory / "plan.json", plan.model_dump_json(indent=2))
        log = EventLog(directory, [registry.build(use) for use in recipe.trackers])
        folders: dict[str, Path] = {}
        records: list[StepRecord] = []
        try:
            log("run", recipe=recipe.name, seed=recipe.seed, device=str(device))
            for name, use in recipe.active_steps():
                if stopping():
                    raise Stopped
                folder = directory / name
                record = _record(recipe, name)
                log.enter(name)
                done = _read(folder / _DONE)
                if done is not None and done.get("record") == record:
                    _say(f"{name}: done before")
                else:
                    again = _prepare(folder, record, resume=resume)
                    begun = time.monotonic()
                    with _nothing_half_begun(folder), show_progress(name) as progress:
                        outcome = registry.build(use, steps=folders).run(
                            Run(
                                directory=folder,
                                earlier=dict(folders),
                                build=partial(registry.build, steps=dict(folders)),
                                seed=recipe.seed,
                                resume=again,
                                device=device,
                                model=_Model(recipe, registry, dict(folders), device),
                                progress=progress,
                                event=log,
                                stopping=stopping,
                            )
                        )
                    seconds = time.monotonic() - begun
                    done = {
                        "record": record,
                        "seconds": round(seconds, 1),
                        "metrics": dict(outcome.metrics),
                        "sections": [
                            section.model_dump(mode="json") for section in outcome.sections
                        ],
                    }
                    log("done", seconds=round(seconds, 1), **outcome.metrics)
                    # written last: its presence means that the step finished
                    write_text(folder / _DONE, json.dumps(done, indent=1, ensure_ascii=False))
                    _say(f"{name}: {_metrics(outcome.metrics)}{duration(seconds)}")
                folders |= {use.use: folder, name: folder}
                records.append(StepRecord.model_validate({"name": name, "folder": folder, **done}))
                write_report(recipe, directory, records)
            _link_model(directory, folders)
        finally:
            log.close()
    return Result(
        {name: folders[name] for name, _ in recipe.active_steps()}, directory / "report.html"
    )


def newest_model(folders: Mapping[str, Path]) -> Path | None:
    """Return the model folder that the latest of the steps left, if any did."""
    found = [folder / "model" for folder in folders.values() if is_model(folder / "model")]
    return max(found, key=lambda path: path.parent.name, default=None)


class _Model:
    """The model as it stands before a step."""

    def __init__(
        self, recipe: Recipe, registry: Registry, folders: Mapping[str, Path], device: torch.device
    ) -> None:
        self._recipe, self._registry, self._folders = recipe, registry, folders
        self._device = device
        self.vision, self.language = recipe.model.vision, recipe.model.language

    def __call__(self, folder: Path | None = None) -> LlavaModel:
        folder = folder or newest_model(self._folders)
        if folder is not None:
            return load_model(folder, self._registry, device=self._device)
        return self.new()

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        return create_model(
            self._recipe.model,
            self._registry,
            seed=self._recipe.seed,
            device=self._device,
            vision=vision,
            language=language,
        )


# -- what is done and what is not ------------------------------------------------------------------


def _record(recipe: Recipe, until: str) -> Record:
    """Return everything that decides what a step's folder holds."""
    steps: list[Any] = []
    files: dict[str, str | int] = {}
    for name, use in recipe.active_steps():
        steps.append(use.model_dump(mode="json"))
        for text in _texts(use.options):
            path = Path(text)
            if text not in files and len(text) < _LONGEST_PATH and path.is_file():
                size = path.stat().st_size
                files[text] = size if size > HASHED_BYTES else digest(path)
        if name == until:
            break
    record = {
        "model": recipe.model.model_dump(mode="json"),
        "seed": recipe.seed,
        "steps": steps,
        "files": files,
    }
    plain: Record = json.loads(json.dumps(record))  # tuples become lists, as in the file
    return plain


def _prepare(folder: Path, record: Record, *, resume: bool) -> bool:
    """Make the step's folder ready; return whether to go on from what it holds."""
    begun = _read(folder / _BEGUN)
    if begun is not None and begun["record"] == record and not (folder / _DONE).exists():
        if resume:
            _say(f"{folder.name}: going on where it was interrupted")
            return True
        aside = _set_aside(folder)
        _say(
            f"{folder.name}: starts over; the interrupted attempt is in {aside} (--resume goes on)"
        )
    elif folder.exists():
        aside = _set_aside(folder)
        what = "its data" if begun and _same_but_files(begun["record"], record) else "the recipe"
        _say(f"{folder.name}: {what} changed, so it is done again; the old one is in {aside}")
    with explain_write(folder):
        folder.mkdir(parents=True)
    write_text(folder / _BEGUN, json.dumps({"record": record}))
    return False


def _same_but_files(before: Record, now: Record) -> bool:
    return {**before, "files": {}} == {**now, "files": {}}


def _set_aside(folder: Path) -> Path:
    """Move a folder out of the way: nothing that was paid for with time or money is deleted."""
    attic = folder.parent / "superseded"
    with explain_write(attic):
        attic.mkdir(exist_ok=True)
        numbers = (attic / f"{folder.name}.{number}" for number in range(1, sys.maxsize))
        place = next(path for path in numbers if not path.exists())
        folder.rename(place)
    return place


@contextmanager
def _nothing_half_begun(folder: Path) -> Iterator[None]:
    """Remove the folder of a step that failed before it left anything."""
    try:
        yield
    except Exception:
        if all(item.name == _BEGUN for item in folder.iterdir()):
            shutil.rmtree(folder)
        raise


def _check_data(recipe: Recipe, registry: Registry, directory: Path) -> None:
    """Build every data set that is there already, so that no step fails on it hours later."""
    for name, use in recipe.active_steps():
        done = _read(directory / name / _DONE)
        if done is None or done.get("record") != _record(recipe, name):
            for data in _data_sets(use, registry):
                registry.build(data)


def _data_sets(value: object, registry: Registry) -> Iterator[Use[Dataset]]:
    """Yield the data sets that a step chooses and that no earlier step has to make."""
    if isinstance(value, Use):
        if issubclass(value.kind(), Dataset):
            if "@" not in {text[:1] for text in _texts(value.options)}:
                yield value
        else:
            component = registry.get(value.kind(), value.use)
            yield from _data_sets(component.Options.model_validate(value.options), registry)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _data_sets(getattr(value, name), registry)
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _data_sets(item, registry)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or "record" not in value:
            raise ValueError("it holds no record")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path} is damaged ({error}); move its folder away and run again"
        ) from error
    return value


def _link_model(directory: Path, folders: Mapping[str, Path]) -> None:
    """Point `model` at the last step's model, relatively, so that the run can be moved."""
    newest = newest_model(folders)
    if newest is None:
        return
    link = directory / "model"
    with explain_write(link):
        partial_link = directory / ".model.partial"
        partial_link.unlink(missing_ok=True)
        if link.exists() and not link.is_symlink():
            _set_aside(link)
        partial_link.symlink_to(newest.relative_to(directory), target_is_directory=True)
        partial_link.replace(link)


# -- surroundings ----------------------------------------------------------------------------------


def _write_facts(recipe: Recipe, device: torch.device, directory: Path) -> None:
    table = without_none(recipe.model_dump(mode="json", exclude_defaults=True))
    write_text(directory / "recipe.toml", tomli_w.dumps(table))
    packages = {}
    for package in ("llavakit", "torch", "transformers", "tokenizers", "numpy", "pillow", "triton"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    write_text(directory / "environment.json", json.dumps(facts, indent=2))


@contextmanager
def _one_run_at_a_time(directory: Path) -> Iterator[None]:
    """Hold a lock that the system releases even when the process is killed."""
    import fcntl

    with explain_write(directory):
        file = (directory / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"another llava-run is writing to {directory}; wait for it or use --out"
            ) from None
        yield


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; a second one ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        _say("stopping at the next safe point (once more to stop at once)")

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _metrics(metrics: Mapping[str, float]) -> str:
    return "".join(f"{name} {value:.4g}, " for name, value in metrics.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
