"""Runs the steps of a recipe, one after another, and skips those that are already done."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, cast

import tomli_w
import torch
from pydantic import BaseModel

from llavakit.assembly import create_model, is_model, load_model, without_none
from llavakit.components import SkippableUse, Use
from llavakit.errors import RecipeError
from llavakit.events import EventLog
from llavakit.files import HASHED_BYTES, digest, explain_write, link_folder, write_text
from llavakit.interfaces import Build, Dataset, Event, Outcome, Run, Step, Stopped, Stopping
from llavakit.model import LlavaModel
from llavakit.networks import LanguageModel, VisionEncoder
from llavakit.planning import make_plan
from llavakit.progress import Display, duration, show_if_slow, show_progress
from llavakit.recipe import Recipe, StepUse
from llavakit.registry import KindT, Registry
from llavakit.reporting import StepRecord, write_report
from llavakit.reuse import DONE as _DONE
from llavakit.reuse import contents, find_step, take_step
from llavakit.team import Team, join_team

_BEGUN = "begun.json"
_LONGEST_PATH = 1024
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run left."""

    folders: Mapping[str, Path]
    report: Path


def run(
    recipe: Recipe,
    registry: Registry,
    directory: Path,
    *,
    resume: bool = False,
    reuse: Sequence[Path] = (),
) -> Result | None:
    """Run every step; return the folder of each, by name.

    A step is skipped when its folder holds the record of the same model and the same steps up to
    and including it. From the first step that differs on, old folders are set aside. A step that
    one of the runs in `reuse` has finished is taken from there.
    Where torchrun started several processes, the first of them does this; the others join it in
    the steps that work `together`, and return None.

    Raises LlavaError for what the user can mend, and Stopped after an interrupt.
    """
    with join_team(recipe.device) as (team, device):
        if not team.leads:
            _assist(_Work(recipe, registry, directory, team, device))
            return None
        work = _Work(recipe, registry, directory, team, device)
        try:
            _lead(work, resume=resume, reuse=reuse)
        finally:
            if not work.together:  # within a step the others stop as it did, or torchrun acts
                team.share(_Order(None))
    folders = {name: directory / name for name, _ in recipe.active_steps()}
    return Result(folders, directory / "report.html")


def _lead(work: _Work, *, resume: bool, reuse: Sequence[Path]) -> None:
    """Run every step, write what is to be written, and report."""
    recipe, directory = work.recipe, work.directory
    plan = make_plan(recipe, work.registry)
    work.build = _check_data(recipe, work.registry, directory).build
    with explain_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _one_run_at_a_time(directory), _interrupts(work.team) as stopping:
        _write_facts(recipe, work.device, directory)
        write_text(directory / "plan.json", plan.model_dump_json(indent=2))
        log = EventLog(directory, [work.registry.build(use) for use in recipe.trackers])
        work.log = log
        records: list[StepRecord] = []
        try:
            log("run", recipe=recipe.name, seed=recipe.seed, device=str(work.device))
            for name, use in recipe.active_steps():
                if stopping():
                    raise Stopped
                log.enter(name)
                record = _record(recipe, name)  # hashes the data: once a step
                done = _done_before(work, name, record, reuse)
                if done is None:
                    done = _one_step(work, name, use, record, stopping, resume=resume)
                records.append(
                    StepRecord.model_validate({"name": name, "folder": directory / name, **done})
                )
                work.folders |= {use.use: directory / name, name: directory / name}
                write_report(recipe, directory, records)
            _link_model(directory, work.folders)
        finally:
            log.close()


@dataclass
class _Work:
    """A run in one process."""

    recipe: Recipe
    registry: Registry
    directory: Path
    team: Team
    device: torch.device
    log: Event = field(default_factory=lambda: _ignore)
    build: Build | None = None
    """What builds components for the steps; the registry itself where absent."""
    together: bool = False
    """Whether all processes are at work on the same step."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Of the steps that are done, by every name a recipe has for them."""

    def do(
        self, name: str, use: StepUse, progress: Display, stopping: Stopping, *, again: bool
    ) -> Outcome:
        """Run one step; `again` says whether to go on from what its folder holds."""
        step = self.registry.build(use, steps=self.folders)
        return step.run(
            Run(
                directory=self.directory / name,
                earlier=dict(self.folders),
                build=partial(self.build or self.registry.build, steps=dict(self.folders)),
                seed=self.recipe.seed,
                resume=again,
                device=self.device,
                model=_Model(self.recipe, self.registry, dict(self.folders), self.device),
                progress=progress,
                event=self.log,
                stopping=stopping,
                team=self.team if step.together else Team(),
            )
        )


def _done_before(
    work: _Work, name: str, record: Record, reuse: Sequence[Path]
) -> dict[str, Any] | None:
    """Return what a step said that was done before, here or in one of the runs in `reuse`."""
    folder = work.directory / name
    done = _read(folder / _DONE)
    if done is not None and done.get("record") == record:
        _say(f"{name}: done before")
        return done
    others = [run for run in reuse if run.resolve() != work.directory.resolve()]
    found, problems = find_step(name, record, others)
    for problem in problems:
        _say(f"{name}: not taken: {problem}")
    if found is None:
        return None
    if folder.exists():
        _set_aside(folder)
    take_step(found, folder)
    work.log("taken", source=str(found))
    _say(f"{name}: taken from {found}")
    return _read(folder / _DONE)


def _one_step(
    work: _Work, name: str, use: StepUse, record: Record, stopping: Stopping, *, resume: bool
) -> dict[str, Any]:
    """Run one step; return what it said."""
    folder = work.directory / name
    again = _prepare(folder, record, resume=resume)
    begun = time.monotonic()
    with _nothing_half_begun(folder), show_progress(name) as progress:
        if work.registry.get(Step, use.use).together:
            work.team.share(_Order(name, again, dict(work.folders)))
            work.together = work.team.size > 1
            stopping = _agreed(work.team, stopping)
        outcome = work.do(name, use, progress, stopping, again=again)
        work.together = False
    seconds = time.monotonic() - begun
    sections = [section.model_dump(mode="json") for section in outcome.sections]
    done = {
        "record": record,
        "seconds": round(seconds, 1),
        "metrics": dict(outcome.metrics),
        "sections": sections,
        "contents": contents(folder),
    }
    work.log("done", seconds=round(seconds, 1), **outcome.metrics)
    # written last: its presence means that the step finished
    write_text(folder / _DONE, json.dumps(done, indent=1, ensure_ascii=False))
    _say(f"{name}: {_metrics(outcome.metrics)}{duration(seconds)}")
    return done


# -- several processes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What the leader asks of the others."""

    step: str | None
    """None: that was all."""
    again: bool = False
    folders: dict[str, Path] = field(default_factory=dict)


def _assist(work: _Work) -> None:
    """Take part in the steps that the leader calls for, until it says that was all."""
    uses = dict(work.recipe.active_steps())
    with _interrupts(work.team) as asked:
        while (order := work.team.share(_Order(None))).step is not None:
            work.folders = order.folders
            stopping = _agreed(work.team, asked)
            try:
                work.do(order.step, uses[order.step], _ignore, stopping, again=order.again)
            except Stopped:
                return


def _agreed(team: Team, stopping: Stopping) -> Stopping:
    """Return a function that stops all processes at the same point; each must ask as often."""
    return stopping if team.size == 1 else lambda: team.any(stopping())


def _ignore(*_: object, **__: object) -> None:
    """Show nothing, write nothing: the leader does."""


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

    @property
    def vision(self) -> Use[VisionEncoder]:
        return self._recipe.parts().vision

    @property
    def language(self) -> Use[LanguageModel]:
        return self._recipe.parts().language

    def __call__(self, folder: Path | None = None) -> LlavaModel:
        folder = folder or newest_model(self._folders)
        if folder is not None:
            return load_model(folder, self._registry, device=self._device)
        return self.new()

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        return create_model(
            self._recipe.parts(),
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
        "model": None if recipe.model is None else recipe.model.model_dump(mode="json"),
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


def _check_data(recipe: Recipe, registry: Registry, directory: Path) -> _Checked:
    """Build every data set that is there already, so that no step fails on it hours later."""
    checked = _Checked(registry)
    for name, use in recipe.active_steps():
        done = _read(directory / name / _DONE)
        if done is None or done.get("record") != _record(recipe, name):
            for data in _data_sets(use, registry):
                with show_if_slow(f"{name}: checking its data") as progress:
                    built = registry.build(data, progress=progress)
                for note in built.notes():
                    _say(f"{name}: {note}")
                checked.keep(data, built)
    return checked


class _Checked:
    """Builds components; a data set that was built to check it is not built again.

    Each is handed out once, so that none outlives its step, and only while its files are the same.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: dict[str, tuple[Any, Dataset]] = {}

    def keep(self, use: Use[Dataset], data: Dataset) -> None:
        self._kept[use.model_dump_json()] = (_stamps(use.options), data)

    def build(
        self, use: Use[KindT], /, steps: Mapping[str, Path] | None = None, **context: Any
    ) -> KindT:
        stamps, data = self._kept.pop(use.model_dump_json(), (None, None))
        if isinstance(data, use.kind()) and stamps == _stamps(use.options):
            return cast("KindT", data)
        return self._registry.build(use, steps=steps, **context)


def _stamps(options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file and folder that options name."""
    found = {}
    for text in _texts(options):
        with suppress(OSError, ValueError):  # most texts are no paths
            state = Path(text).stat()
            found[text] = (state.st_size, state.st_mtime_ns)
    return found


def _data_sets(value: object, registry: Registry) -> Iterator[Use[Dataset]]:
    """Yield the data sets that a step chooses and that no earlier step has to make."""
    if isinstance(value, Use):
        if isinstance(value, SkippableUse) and value.skip:
            return
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
    if link.exists() and not link.is_symlink():
        _set_aside(link)
    link_folder(link, newest)


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
def _interrupts(team: Team) -> Iterator[Stopping]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; a second one ends at once.

    In a team both come, from the terminal and from torchrun, which ends everything itself in time.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and team.size == 1:
            raise KeyboardInterrupt
        if not asked and team.leads:
            again = "" if team.size > 1 else " (once more to stop at once)"
            _say(f"stopping at the next safe point{again}")
        asked.append(number)

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
