"""The `llava-run` command. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import LlavaError

Command = Callable[[argparse.Namespace], int]

_USAGE = """\
llava-run RECIPE [--out DIR] [--set a.b.c=value ...] [--plan] [--resume]
       llava-run COMMAND ...

RECIPE is a TOML file or the name of a built-in recipe (llava-run recipes lists them).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when done, 2 where the user can mend it, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal has no letter for, is spelt out
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    commands = parser.get_default("commands")
    if arguments and arguments[0] not in {*commands, "-h", "--help", "--version"}:
        arguments.insert(0, "run")
    flags: list[str] = []
    if arguments[:1] == ["score"]:  # its flags are known once the benchmarks are
        arguments, flags = arguments[:1], arguments[1:]
    parsed = parser.parse_args(arguments, argparse.Namespace(flags=flags))
    if not hasattr(parsed, "command"):
        parser.print_help()
        return 0
    command: Command = parsed.command
    try:
        return command(parsed)
    except LlavaError as error:
        _let_the_leader_speak()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0


def _let_the_leader_speak() -> None:
    """Of several processes under torchrun most meet the same error; one that says it is enough.

    The leader ends with it, and torchrun ends the others then.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-run",
        usage=_USAGE,
        description="Make, try and convert LLaVA models by recipe.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    run = commands.add_parser("run", help="run a recipe (the word `run` may be left out)")
    run.add_argument("recipe", help="a recipe file, or the name of a built-in recipe")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (runs/NAME)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, for example steps.finetune.epochs=2",
    )
    run.add_argument("--plan", action="store_true", help="print what it will cost; run nothing")
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

    recipes = commands.add_parser("recipes", help="list the built-in recipes")
    recipes.set_defaults(command=_recipes)

    plugins = commands.add_parser("plugins", help="list the installed components by kind")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(command=_plugins)

    chat = commands.add_parser("chat", help="ask a model about images")
    chat.add_argument("model", type=Path, help="a model folder, or a name on the hub")
    chat.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    chat.add_argument("--prompt", help="ask this once and print only the answer")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--seed", type=int)
    chat.add_argument("--device", default="auto")
    chat.add_argument(
        "--heatmap", type=Path, metavar="PNG", help="with --prompt: draw where the model looks"
    )
    chat.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an option of a part, for example language.quantize=nf4",
    )
    _add_sources(chat)
    chat.set_defaults(command=_chat)

    export = commands.add_parser("export", help="write a model in another layout")
    export.add_argument(
        "model", type=Path, help="a model folder of any layout, or a name on the hub"
    )
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--format", required=True, help="the exporter: see llava-run plugins")
    export.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="its options"
    )
    _add_sources(export)
    export.set_defaults(command=_export)

    imports = commands.add_parser("import", help="turn another layout into a model folder")
    imports.add_argument(
        "source", type=Path, help="a model folder of any layout, or a name on the hub"
    )
    imports.add_argument("out", type=Path, help="the folder to write")
    _add_sources(imports)
    imports.set_defaults(command=_import)

    score = commands.add_parser("score", help="score files of answers or reviews", add_help=False)
    score.set_defaults(command=_score)

    check = commands.add_parser("check-data", help="look at training data before using it")
    check.add_argument("file", type=Path, help="the data: LLaVA's JSON, or JSON lines (.jsonl)")
    check.add_argument("--images", type=Path, metavar="DIR", help="the folder of its images")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="count tokens with this one (a folder, a file or a hub name) instead of estimating",
    )
    check.add_argument("--template", metavar="NAME", help="the prompt template (vicuna_v1)")
    check.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="where samples are cut (2048)"
    )
    check.add_argument(
        "--visual-tokens", type=int, default=256, metavar="N", help="tokens of one image (256)"
    )
    check.add_argument(
        "--dataset", default="conversations", metavar="NAME", help="what reads the file"
    )
    check.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="its other options"
    )
    check.set_defaults(command=_check_data)

    compare = commands.add_parser("compare", help="put runs side by side, by recipe and seed")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="show only this, for example evaluate.sighted_* (evaluations)",
    )
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="also write a table")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=_compare)

    parser.set_defaults(commands=frozenset(commands.choices))
    return parser


def _add_sources(command: argparse.ArgumentParser) -> None:
    """Add what some layouts leave out of a model folder."""
    group = command.add_argument_group("what a layout may leave out (docs/layouts.md)")
    group.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the language model of an adapter, projector or delta",
    )
    group.add_argument("--vision", type=Path, metavar="DIR", help="the vision encoder")
    group.add_argument("--template", metavar="NAME", help="the prompt template")


def _load(
    folder: Path,
    arguments: argparse.Namespace,
    device: str,
    options: Mapping[str, Any] | None = None,
) -> Any:
    import llavakit

    return llavakit.load(
        folder,
        device=device,
        base=arguments.base,
        vision=arguments.vision,
        template=arguments.template,
        options=options,
    )


class _Version(argparse.Action):
    """Prints the installed version, looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llava-run {version('llavakit')}")
        parser.exit()


def _run(arguments: argparse.Namespace) -> int:
    from llavakit.interfaces import Stopped
    from llavakit.planning import make_plan
    from llavakit.recipe import Recipe, find_recipe
    from llavakit.registry import Registry

    registry = Registry.installed()
    path = find_recipe(arguments.recipe)
    recipe = Recipe.load(path, registry, arguments.set, inputs=not arguments.plan)
    if arguments.plan:
        print(make_plan(recipe, registry).render())
        return 0
    from llavakit.engine.reuse import runs_below
    from llavakit.engine.runner import run

    directory = arguments.out or Path("runs") / recipe.name
    reuse = runs_below(arguments.reuse)
    try:
        result = run(recipe, registry, directory, resume=arguments.resume, reuse=reuse)
    except Stopped:
        again = [arguments.recipe, "--out", str(directory)]
        again += [word for change in arguments.set for word in ("--set", change)]
        again += [word for folder in reuse for word in ("--reuse", str(folder))]
        print(
            f"stopped; what was done is in {directory}. Go on with: llava-run "
            f"{shlex.join(again)} --resume",
            file=sys.stderr,
        )
        return 130
    if result is not None:  # None: another process leads
        print(f"{recipe.name}: done, see {result.report}")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from llavakit.recipe import recipe_folder

    folder = recipe_folder()
    recipes = {
        file.relative_to(folder).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(folder.rglob("*.toml"))
    }
    width = max(map(len, recipes)) + 2
    for name, text in recipes.items():
        comment = text.partition("\n")[0].removeprefix("#").strip()
        print(f"{name:{width}}{comment}")
    return 0


def _plugins(arguments: argparse.Namespace) -> int:
    import json

    from llavakit.kinds import KINDS
    from llavakit.registry import Registry

    registry = Registry.installed()
    for kind in KINDS:
        registry.all(kind)  # two of one name, or a class of another kind, is an error here, too
    found = {
        kind.__name__: [
            {"name": name, "package": package, "version": version}
            for name, (package, version) in sorted(registry.origins(kind).items())
        ]
        for kind in KINDS
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for kind_name, components in found.items():
        print(kind_name)
        for item in components:
            print(f"  {item['name']:20}{item['package']} {item['version']}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.heatmap is not None and (arguments.prompt is None or not arguments.image):
        raise LlavaError("--heatmap draws one answer over its image: give --prompt and --image too")
    model = _load(arguments.model, arguments, arguments.device, _table(arguments.set))
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    if arguments.heatmap is not None:
        _chat_with_heatmap(arguments, model)
        return 0
    if arguments.prompt is not None:
        print(model.generate(arguments.prompt, images=arguments.image, **settings))
        return 0
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        if not question:
            continue
        try:
            for piece in model.stream(question, images=arguments.image, **settings):
                print(piece, end="", flush=True)
            print()
        except LlavaError as error:  # of this question; the next may do
            print(f"error: {error}", file=sys.stderr)


def _table(assignments: Sequence[str]) -> dict[str, Any]:
    """Return what `part.option=value` say, as tables of options."""
    from llavakit.checking import set_key

    table: dict[str, Any] = {}
    for assignment in assignments:
        if "." not in assignment.partition("=")[0]:
            raise LlavaError(f"--set {assignment}: write it as part.option=value")
        set_key(table, assignment)
    return table


def _chat_with_heatmap(arguments: argparse.Namespace, model: object) -> None:
    from llavakit.errors import ModelError
    from llavakit.gaze import watch_answer
    from llavakit.generation import Sampling
    from llavakit.heatmap import draw_gaze
    from llavakit.images import save_image
    from llavakit.model import LlavaModel

    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.model} is in a layout that shows no attention; --heatmap needs a model "
            "folder, or a layout that `llava-run import` turns into one"
        )
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    gaze = watch_answer(model, arguments.prompt, arguments.image, sampling)
    save_image(draw_gaze(gaze, arguments.image, model.vision), arguments.heatmap)
    print(gaze.answer)


def _export(arguments: argparse.Namespace) -> int:
    from llavakit.checking import build_from
    from llavakit.errors import ModelError
    from llavakit.interfaces import Exporter
    from llavakit.model import LlavaModel
    from llavakit.registry import Registry

    registry = Registry.installed()
    exporter = build_from(registry.get(Exporter, arguments.format), arguments.set, registry)
    _refuse_to_replace(arguments.out)
    model = _load(arguments.model, arguments, "cpu")
    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.model} can be run but not written in another layout; export the model "
            "folder that it was made of"
        )
    for name, value in exporter.export(model.merged(), arguments.out).items():
        print(f"{name}: {value}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from llavakit.assembly import save_model
    from llavakit.errors import ModelError
    from llavakit.model import LlavaModel

    _refuse_to_replace(arguments.out)
    model = _load(arguments.source, arguments, "cpu")
    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.source} can be run but not turned into a model folder: its layout keeps "
            "no weights that training could go on from"
        )
    save_model(model, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from llavakit.registry import Registry
    from llavakit.scoring import score_command

    return score_command(arguments.flags, Registry.installed())


def _check_data(arguments: argparse.Namespace) -> int:
    import json

    from llavakit.checking import build_from, state_options
    from llavakit.components import Use
    from llavakit.errors import DataError
    from llavakit.inspection import Lengths, inspect_data, render
    from llavakit.interfaces import Dataset, PromptTemplate
    from llavakit.progress import show_progress
    from llavakit.registry import Registry

    places = {"path": arguments.file, "images": arguments.images}
    for place in filter(None, places.values()):
        if not place.exists():
            raise DataError(f"{place} does not exist; check its spelling")
    registry = Registry.installed()
    flags = {key: str(place) for key, place in places.items() if place is not None}
    reader = registry.get(Dataset, arguments.dataset)
    options = state_options(reader, arguments.set, registry, flags)
    use = Use[Dataset].model_validate({**options, "use": reader.name})
    if arguments.max_length < 2 or arguments.visual_tokens < 1:
        raise DataError("--max-length is 2 or more, --visual-tokens 1 or more")
    lengths = Lengths(arguments.max_length, arguments.visual_tokens)
    if arguments.tokenizer is not None:
        from llavakit.networks import LanguageModel
        from llavakit.tokenizer_files import find_tokenizer

        name = arguments.template or LanguageModel.default_template
        lengths = Lengths(
            arguments.max_length,
            arguments.visual_tokens,
            find_tokenizer(arguments.tokenizer),
            build_from(registry.get(PromptTemplate, name), [], registry),
        )
    elif arguments.template is not None:
        raise DataError("--template needs --tokenizer: without one, lengths are estimated")
    with show_progress("check-data") as progress:
        report = inspect_data(use, registry, lengths, progress)
    if arguments.json:
        print(json.dumps(report.model_dump(), indent=2))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(*render(report), sep="\n")
    if report.usable:
        return 0
    stopping = [f"{sort.sort} ({sort.count:,})" for sort in report.findings if sort.stops]
    raise DataError(
        f"{arguments.file} would stop a training: {', '.join(stopping) or 'it has no samples'}"
    )


def _compare(arguments: argparse.Namespace) -> int:
    from llavakit.comparing.table import compare
    from llavakit.files import write_text
    from llavakit.reporting.page import comparison_page

    found = compare(arguments.runs, arguments.metric)
    if arguments.csv is not None:
        write_text(arguments.csv, found.csv())
    if arguments.html is not None:
        facts = [f"{sum(len(group.runs) for group in found.groups)} runs", *map(str, found.orders)]
        sections = [found.table(), *([found.order_table()] if found.orders else [])]
        page = comparison_page("Runs side by side", facts, sections, found.left_out)
        write_text(arguments.html, page)
    print(found.json() if arguments.json else found.text())
    return 0


def _refuse_to_replace(folder: Path) -> None:
    """Writing replaces a folder whole, so it must not be one that holds something."""
    from llavakit.errors import ModelError

    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ModelError(f"{folder} is there already; name a new folder, or remove that one")


if __name__ == "__main__":
    raise SystemExit(main())
