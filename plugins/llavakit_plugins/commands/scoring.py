"""`llava-run score`: scores files that hold answers already, as benchmarks know how to."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llavakit import Registry
from llavakit.contracts.component import Component, Use
from llavakit.contracts.errors import PluginError, RecipeError
from llavakit_plugins.evaluation.file_scores import FileScorer


def score_command(
    arguments: Sequence[str],
    registry: Registry,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run `llava-run score` with what stands behind it; `parser_class` is the command line's."""
    from llavakit import did_you_mean, finite, printable_json, shown
    from llavakit_plugins.commands.options import build_from
    from llavakit_plugins.reporting.plain import plain

    scorers = find_scorers(registry)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: llava-run score NAME ...\n")
        for name, scorer in scorers.items():
            print(shown(f"  {name:20}{_sentence(scorer)}"))
        print("\nllava-run score NAME --help lists its flags.")
        return 0
    name = arguments[0]
    if name not in scorers:
        hint = did_you_mean(name, scorers, f"there are: {', '.join(scorers)}")
        raise RecipeError(f"nothing called `{name}` can be scored; {hint}")
    scorer = scorers[name]
    # options that are not stated are left to the scorer's own defaults
    stated = vars(_parser(scorer, parser_class).parse_args(arguments[1:]))
    settings, as_json = stated.pop("--set"), stated.pop("--json")
    flags = {
        key: {"use": value} if _is_choice(scorer.Options.model_fields[key]) else value
        for key, value in stated.items()
        if value is not None
    }
    result = build_from(scorer, settings, registry, flags).score()
    for note in result.notes:
        print(shown(f"note: {note}"), file=sys.stderr)
    if as_json:
        print(printable_json(json.dumps(finite(result.data), indent=2)))
    else:
        print(shown("\n\n".join(plain(table) for table in result.tables)))
    return 0


def find_scorers(registry: Registry) -> dict[str, type[FileScorer]]:
    """Return every scorer of the installed benchmarks, by name."""
    from llavakit.contracts.interfaces import Benchmark

    found: dict[str, type[FileScorer]] = {}
    for benchmark in registry.all(Benchmark).values():
        for scorer in benchmark.scorers:
            if not issubclass(scorer, FileScorer):
                raise PluginError(
                    f"`scorers` of benchmark `{benchmark.name}` holds {scorer.__qualname__}; it "
                    "must derive from llavakit_plugins.evaluation.file_scores.FileScorer"
                )
            other = found.setdefault(scorer.name, scorer)
            if other is not scorer:
                raise PluginError(
                    f"{scorer.__module__}.{scorer.__qualname__} and {other.__module__}."
                    f"{other.__qualname__} both score `{scorer.name}`; uninstall one of them"
                )
    return dict(sorted(found.items()))


def _sentence(component: type[Component]) -> str:
    return (inspect.getdoc(component) or "").partition("\n")[0]


def _parser(
    scorer: type[FileScorer], parser_class: type[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    parser = parser_class(
        prog=f"llava-run score {scorer.name}", description=_sentence(scorer), allow_abbrev=False
    )
    for name, field in scorer.Options.model_fields.items():
        kind = _plain_type(field)
        # argparse formats help texts with `%`
        settings: dict[str, Any] = {"help": (field.description or "").replace("%", "%%")}
        if kind is bool:
            parser.add_argument(_flag(name), dest=name, action="store_true", **settings)
            continue
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        else:
            settings["metavar"] = _metavar(name, field)
        if name in scorer.positional:
            parser.add_argument(name, **settings)
        else:
            required = field.is_required()
            parser.add_argument(_flag(name), dest=name, required=required, **settings)
    # names with dashes, which no option of a scorer can have
    parser.add_argument("--json", dest="--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--set", dest="--set", action="append", default=[], metavar="NAME=VALUE",
        help="set an option of a part, for example judge.model=NAME",
    )  # fmt: skip
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(name: str, field: FieldInfo) -> str:
    from pathlib import Path

    if _is_choice(field):
        return "NAME"
    return "FILE" if _plain_type(field) is Path else name.upper()


def _is_choice(field: FieldInfo) -> bool:
    kind = _plain_type(field)
    return isinstance(kind, type) and issubclass(kind, Use)


def _plain_type(field: FieldInfo) -> Any:
    """Return an option's type without `None` and without annotations."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else kind
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
