"""Runs the steps of a recipe, one after another, and skips those that are already done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llavakit.contracts.errors import PluginError, and_more
from llavakit.contracts.run import Outcome, ProcessGroup, Progress, Run, Step, Stopped, Stopping
from llavakit.engine.checked_data import check_data
from llavakit.engine.distributed import Device, join_process_group, was_restarted
from llavakit.engine.environment import recipe_text, write_environment
from llavakit.engine.events import EventLog, finite
from llavakit.engine.interrupts import interrupts
from llavakit.engine.plan import make_plan
from llavakit.engine.progress import duration, say, show_progress
from llavakit.engine.reuse import STEP_DONE, Finder, Record, step_contents, take_step
from llavakit.engine.step_folders import none_half_begun, prepare, read_done, record_of, set_aside
from llavakit.engine.step_models import StepModel, link_newest
from llavakit.recipe.files import explain_write, one_writer, write_text
from llavakit.recipe.recipe import Recipe, StepUse
from llavakit.registry import Registry, no_exit


def run(
    recipe: Recipe,
    registry: Registry,
    directory: Path,
    *,
    resume: bool = False,
    reuse: Finder = lambda name, record, directory: (None, []),
) -> dict[str, Path] | None:
    """Run every step; return the folder of each, by name.

    A step is skipped when its folder holds the record of the same model and the same steps up to
    and including it. From the first step that differs on, old folders are set aside. A step that
    `reuse` finds finished elsewhere is taken from there.
    Where torchrun started several processes, the first of them does this; the others join it in
    the steps that work `together`, and return None.

    Raises LlavaError for what the user can fix, and Stopped after an interrupt.
    """
    with join_process_group(recipe.device) as (process_group, device):
        steps = (registry.get(Step, use.use) for _, use in recipe.active_steps())
        # making data needs neither a device nor torch; one that is not there is said at once
        if recipe.model is not None or any(step.needs_model for step in steps):
            device.find()
        work = _Work(recipe, registry, directory, process_group, device)
        if not process_group.is_main:
            _assist(work)
            return None
        try:
            _lead(work, resume=resume or was_restarted(), reuse=reuse)
        finally:
            if not work.together:  # within a step the others stop as it did, or torchrun acts
                process_group.broadcast(_Order(None))
    return {name: directory / name for name, _ in recipe.active_steps()}


def _lead(work: _Work, *, resume: bool, reuse: Finder) -> None:
    """Run every step, write what is to be written, and report."""
    recipe, directory = work.recipe, work.directory
    plan = make_plan(recipe, work.registry)
    path, text = directory / "recipe.toml", recipe_text(recipe)
    same = resume and path.is_file() and path.read_text("utf-8", "replace") == text
    since = path.stat().st_mtime_ns if same else 0
    work.build = check_data(recipe, work.registry, directory, since).build
    with explain_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory), interrupts(work.process_group) as stopping:
        write_text(path, text)
        write_environment(work.device.known, directory)
        write_text(directory / "plan.json", plan.model_dump_json(indent=2))  # as it was promised
        log = EventLog(directory, [work.registry.build(use) for use in recipe.trackers])
        work.log = log
        try:
            log("run", recipe=recipe.name, seed=recipe.seed, device=str(work.device))
            for name, use in recipe.active_steps():
                if stopping():
                    raise Stopped
                log.step = name
                record = record_of(recipe, name)  # hashes the data: once a step
                if not _done_before(work, name, record, reuse):
                    _one_step(work, name, use, record, stopping, resume=resume)
                work.folders |= {use.use: directory / name, name: directory / name}
                link_newest(directory, work.folders)
        finally:
            log.close()


@dataclass
class _Work:
    """A run in one process."""

    recipe: Recipe
    registry: Registry
    directory: Path
    process_group: ProcessGroup
    device: Device
    log: Callable[..., None] = field(default_factory=lambda: _ignore)
    build: Callable[..., Any] | None = None  #: Builds parts of steps; None: the registry.
    together: bool = False  #: Whether all processes are at work on the same step.
    folders: dict[str, Path] = field(default_factory=dict)  #: Of done steps, by all their names.

    def do(
        self, name: str, use: StepUse, progress: Progress, stopping: Stopping, *, again: bool
    ) -> Outcome:
        """Run one step; `again` says whether to go on from what its folder holds."""
        step, earlier = self.registry.build(use, steps=self.folders), dict(self.folders)
        given = Run(
            directory=self.directory / name,
            earlier=earlier,
            build=partial(self.build or self.registry.build, steps=dict(earlier)),
            seed=self.recipe.seed,
            resume=again,
            find_device=self.device.find,
            model=StepModel(self.recipe, self.registry, dict(earlier), self.device),
            progress=progress,
            event=self.log,
            stopping=stopping,
            process_group=self.process_group if step.together else ProcessGroup(),
        )
        with no_exit(f"step `{use.use}`"):
            return step.run(given)


def _done_before(work: _Work, name: str, record: Record, reuse: Finder) -> bool:
    """Say whether a step was done before, here or where `reuse` finds it; then it is taken."""
    folder = work.directory / name
    done = read_done(folder)
    if done is not None and done["record"] == record:
        work.log("kept")
        say(f"{name}: done before")
        return True
    found, problems = reuse(name, record, work.directory)
    if problems:
        say(f"{name}: not taken: {and_more(problems)}")
    if found is None:
        return False
    if folder.exists():
        set_aside(folder)
    take_step(found, folder)
    work.log("taken", source=str(found))
    say(f"{name}: taken from {found}")
    return True


def _one_step(
    work: _Work, name: str, use: StepUse, record: Record, stopping: Stopping, *, resume: bool
) -> None:
    """Run one step, and write what it said."""
    folder = work.directory / name
    again = prepare(folder, record, resume=resume)
    begun = time.monotonic()
    with none_half_begun(folder), show_progress(name) as progress:
        if work.registry.get(Step, use.use).together:
            work.process_group.broadcast(_Order(name, again, dict(work.folders)))
            work.together = work.process_group.size > 1  # an error now is for torchrun to end
            stopping = _agreed(work.process_group, stopping)  # else some would stop, others wait
        outcome = work.do(name, use, progress, stopping, again=again)
        work.together = False
    seconds = time.monotonic() - begun
    write_environment(work.device.known, work.directory)  # the step may have asked for one
    metrics = _checked_metrics(use, outcome)
    sections = [section.model_dump(mode="json") for section in outcome.sections]
    done = {"record": record, "seconds": round(seconds, 1), "metrics": metrics}
    done |= {"sections": sections, "contents": step_contents(folder)}
    # written when all else is there: its presence means that the step finished
    text = json.dumps(finite(done), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / STEP_DONE, text)
    work.log("done", **{"seconds": round(seconds, 1), **metrics})
    digits = {name: ",.0f" if float(m).is_integer() else ",.4g" for name, m in metrics.items()}
    figures = "".join(f"{key} {value:{digits[key]}}, " for key, value in metrics.items())
    say(f"{name}: {figures}{duration(seconds)}")


def _checked_metrics(use: StepUse, outcome: object) -> dict[str, float]:
    """Return the numbers that a step reports. Raises PluginError where it reports none."""
    if not isinstance(outcome, Outcome):
        raise PluginError(
            f"step `{use.use}` returned {type(outcome).__name__} from `run`; return an Outcome"
        )
    metrics = dict(outcome.metrics)
    for name, value in metrics.items():
        if not isinstance(value, int | float):  # numpy's and torch's numbers are none of JSON's
            try:
                metrics[name] = float(value)
            except (TypeError, ValueError) as error:
                raise PluginError(
                    f"step `{use.use}` reports {value!r} as its metric `{name}`; report a number"
                ) from error
    return metrics


@dataclass(frozen=True)
class _Order:
    """What the leader asks of the others."""

    step: str | None  #: None: that was all.
    again: bool = False
    folders: dict[str, Path] = field(default_factory=dict)


def _assist(work: _Work) -> None:
    """Take part in the steps that the leader calls for, until it says that was all."""
    uses = dict(work.recipe.active_steps())
    with interrupts(work.process_group) as asked:
        while (order := work.process_group.broadcast(_Order(None))).step is not None:
            work.folders = order.folders
            stopping = _agreed(work.process_group, asked)
            try:
                work.do(order.step, uses[order.step], _ignore, stopping, again=order.again)
            except Stopped:
                return


def _agreed(process_group: ProcessGroup, stopping: Stopping) -> Stopping:
    """Return a function that stops all processes at the same point; each must ask as often."""
    return stopping if process_group.size == 1 else lambda: process_group.any(stopping())


def _ignore(*_: object, **__: object) -> None:
    """Show nothing, write nothing: the leader does."""
