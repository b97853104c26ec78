"""`llava-run RECIPE`: runs a recipe, or prints what it will cost."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llavakit.contracts.commands import Commands

if TYPE_CHECKING:
    from llavakit import Plan, Recipe


def add(commands: Commands) -> None:
    run = commands.add_parser("run", help="run a recipe (the word `run` may be left out)")
    run.add_argument("recipe", help="a recipe file, or the name of a built-in recipe")
    run.add_argument("--out", type=_folder, metavar="DIR", help="run folder (runs/NAME)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one key, for example steps.finetune.epochs=2",
    )
    run.add_argument("--plan", action="store_true", help="print what it will cost; run nothing")
    run.add_argument(
        "--devices", type=int, metavar="N", help="with --plan: for so many of such devices"
    )
    run.add_argument("--json", action="store_true", help="with --plan: as JSON")
    run.add_argument("--resume", action="store_true", help="go on where an attempt was interrupted")
    run.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="take steps that a run there has finished the same way (a run's folder, or runs)",
    )
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.program:  # until the engine says otherwise: nothing is at stake yet
        # as an exception it may come within the import of a library that catches everything
        signal.signal(signal.SIGINT, _end_at_once)
    from llavakit import no_exit

    with no_exit(f"{arguments.recipe}"):  # as a plugin may in `plan` or in its options
        return _plan_or_run(arguments)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


def _plan_or_run(arguments: argparse.Namespace) -> int:
    from llavakit import Recipe, RecipeError, Registry, Stopped, find_recipe, run, shown
    from llavakit_plugins.commands.importing import import_for_training, kept_imports
    from llavakit_plugins.commands.reuse import finished_in, runs_below

    for flag, given in (("--devices", arguments.devices), ("--json", arguments.json)):
        if given is not None and given is not False and not arguments.plan:
            raise RecipeError(f"{flag} is about a plan; add --plan (torchrun says how many run)")

    path = find_recipe(arguments.recipe)
    if arguments.plan:
        from llavakit_plugins.outlines.plan import plan_of

        def load(registry: Registry) -> Recipe:
            recipe = Recipe.load(path, registry, arguments.set)
            return _on_devices(recipe, arguments.devices)

        plan = plan_of(load)
        print(shown(plan.model_dump_json(indent=2) if arguments.json else _as_text(plan)))
        return 0
    with kept_imports() if arguments.program else nullcontext():
        registry = Registry.installed()
        recipe = Recipe.load(path, registry, arguments.set, inputs=True)
        import_for_training(recipe.model, registry)
    directory = arguments.out or Path("runs") / recipe.name
    _check_folder(directory)
    reuse = runs_below(arguments.reuse)
    try:
        result = run(recipe, registry, directory, resume=arguments.resume, reuse=finished_in(reuse))
    except Stopped:
        again = [arguments.recipe, "--out", str(directory)]
        again += [word for change in arguments.set for word in ("--set", change)]
        again += [word for folder in reuse for word in ("--reuse", str(folder))]
        print(
            shown(
                f"stopped; what was done is in {directory}. Go on with: llava-run "
                f"{shlex.join(again)} --resume"
            ),
            file=sys.stderr,
        )
        return 130
    if result is not None:  # None: another process leads
        report = directory / "report.html"
        seen = report if report.is_file() else directory
        print(shown(f"{recipe.name}: done, see {seen}"))
    return 0


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("its name is empty; name a folder, or leave --out away")
    return Path(text)


def _check_folder(directory: Path) -> None:
    """Raise RecipeError where a run would write over files that no run has written."""
    from llavakit import RecipeError

    if any((directory / name).exists() for name in (".lock", "plan.json")):  # a run's folder
        return
    for name in ("recipe.toml", "report.html", "report.md", "events.jsonl", "environment.json"):
        if (directory / name).exists():
            raise RecipeError(
                f"{directory / name} is no run's, and a run would write over it; choose another "
                "folder by --out"
            )


def _on_devices(recipe: Recipe, number: int | None) -> Recipe:
    """Return the recipe for so many devices of its machine's kind, each at the same price."""
    from llavakit import RecipeError

    if number is None:
        return recipe
    if number < 1:
        raise RecipeError(f"--devices {number}: a plan needs one device at least")
    machine = recipe.machine
    if machine.devices == number:
        return recipe
    changes = {
        "name": f"{number} devices like those of {machine.name}",
        "devices": number,
        "usd_per_hour": machine.usd_per_hour / machine.devices * number,
    }
    return recipe.model_copy(update={"machine": machine.model_copy(update=changes)})


def _as_text(plan: Plan) -> str:
    """Return the plan as the display `plan` of `llavakit.displays` writes it, else as JSON."""
    for display in entry_points(group="llavakit.displays", name="plan"):
        return str(display.load()(plan))
    return plan.model_dump_json(indent=2)
