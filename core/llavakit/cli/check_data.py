"""`llava-run check-data`: looks at training data before it is used."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.cli.flags import Commands, add_settings
from llavakit.errors import DataError


def add(commands: Commands) -> None:
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
    add_settings(check, "its other options")
    check.set_defaults(command=_check_data)


def _check_data(arguments: argparse.Namespace) -> int:
    import json

    from llavakit.checking import build_from, state_options
    from llavakit.components import Use
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
