"""`llava-run check-data`: looks at training data before it is used."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import DataError
from llavakit_plugins.commands.flags import add_settings

if TYPE_CHECKING:
    from llavakit_plugins.datasets.inspection_report import Report, Tokens

_SHOWN = 5  # findings of each sort
_NAMED_ELSEWHERE = ("huggingface", "webdataset")  # what these read may lie elsewhere


def add(commands: Commands) -> None:
    check = commands.add_parser("check-data", help="look at training data before using it")
    check.add_argument(
        "file",
        nargs="?",
        help="the data: LLaVA's JSON, JSON lines (.jsonl), tar shards ('shard-{000..099}.tar'), "
        "what the package `datasets` reads, or a name on the hub; for a --dataset without an "
        "option `path`, leave it out and give --set",
    )
    check.add_argument("--images", type=Path, metavar="DIR", help="the folder of its images")
    check.add_argument(
        "--thorough", action="store_true", help="decode every image, not its two ends alone"
    )
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
        "--visual-tokens", type=int, default=256, metavar="N", help="tokens of one view (256)"
    )
    check.add_argument(
        "--tiling",
        nargs="+",
        default=[],
        metavar=("NAME", "OPTION=VALUE"),
        help="count the rows of images as this tiling does, with its options",
    )
    check.add_argument(
        "--view-size", type=int, default=336, metavar="N", help="edge of a view in pixels (336)"
    )
    check.add_argument(
        "--dataset", metavar="NAME", help="what reads the file (by default its name tells)"
    )
    add_settings(check, "its other options")
    check.set_defaults(command=_check_data)


def _check_data(arguments: argparse.Namespace) -> int:
    import json

    from llavakit import Registry, Tiling, View, Views, printable_json, show_progress
    from llavakit.contracts.component import Use
    from llavakit.contracts.interfaces import Dataset, PromptTemplate
    from llavakit_plugins.commands.options import build_from, state_options
    from llavakit_plugins.datasets.huggingface import reader_of
    from llavakit_plugins.datasets.inspection import inspect_data
    from llavakit_plugins.datasets.lengths import Lengths

    given = {"path": arguments.file, "images": arguments.images}
    registry = Registry.installed()
    flags = {key: str(value) for key, value in given.items() if value is not None}
    named = arguments.dataset or reader_of(flags.get("path", ""))
    reader = registry.get(Dataset, named)
    # a name on the hub is no path, and shards are named as patterns; all else has to be there
    named_here = [flags[key] for key in flags if key == "images" or named not in _NAMED_ELSEWHERE]
    for name in named_here:
        if not Path(name).exists():
            raise DataError(f"{name} does not exist; check its spelling")
    known = list(reader.Options.model_fields)
    for key, word in (("path", "FILE"), ("images", "--images")):
        if key in flags and key not in known:
            raise DataError(
                f"data set `{reader.name}` has no option `{key}`: leave {word} out and give its "
                f"options with --set key=value ({', '.join(known) or 'it has none'})"
            )
    options = state_options(reader, arguments.set, registry, flags)
    use = Use[Dataset].model_validate({**options, "use": reader.name})
    if arguments.max_length < 2 or arguments.visual_tokens < 1 or arguments.view_size < 1:
        raise DataError("--max-length is 2 or more, --visual-tokens and --view-size 1 or more")
    tiling = None
    if arguments.tiling:
        name, *settings = arguments.tiling
        tiling = build_from(registry.get(Tiling, name), settings, registry)
        tiling = tiling if tiling.varies else None
    views = Views(tiling, View(arguments.view_size, arguments.visual_tokens))
    lengths = Lengths(arguments.max_length, views)
    if arguments.tokenizer is not None:
        from llavakit.contracts.networks import LanguageModel
        from llavakit_plugins.huggingface.tokenizers import find_tokenizer

        name = arguments.template or LanguageModel.default_template
        lengths = Lengths(
            arguments.max_length,
            views,
            find_tokenizer(arguments.tokenizer),
            build_from(registry.get(PromptTemplate, name), [], registry),
        )
    elif arguments.template is not None:
        raise DataError("--template needs --tokenizer: without one, lengths are estimated")
    with show_progress("check-data") as progress:
        report = inspect_data(use, registry, lengths, progress, thorough=arguments.thorough)
    if arguments.json:
        print(printable_json(json.dumps(report.model_dump(), indent=2)))
    else:
        from rich.console import Console

        # no line breaks within a path, so that it can be copied
        Console(soft_wrap=True).print(*_render(report), sep="\n")
    if report.usable:
        return 0
    stopping = [f"{sort.sort} ({sort.count:,})" for sort in report.findings if sort.stops]
    raise DataError(
        f"{report.data} would stop a training: {', '.join(stopping) or 'it has no samples'}"
    )


# -- as text ---------------------------------------------------------------------------------------


def _render(report: Report) -> Iterator[object]:
    """Yield what rich prints of a report: tables, histograms, the first findings of each sort."""
    from rich.table import Table
    from rich.text import Text

    from llavakit import shown
    from llavakit_plugins.datasets.inspection_report import KEPT

    head = Table(show_header=False, title=Text(shown(report.data)), title_justify="left")
    head.add_column()
    head.add_column(justify="right")
    head.add_column()
    unread, mixed = report.rows - report.samples, report.videos > 0
    for name, value, remark in (
        ("samples", report.samples, f"{unread:,} rows cannot be used" if unread else ""),
        (f"  with one image{' or video' * mixed}", report.image_samples, ""),
        (f"  with several images{' or videos' * mixed}", report.multi_image_samples, ""),
        ("  text only", report.text_samples, ""),
        *([("  preferences", report.preferences, "")] if report.preferences else []),
        ("turns", report.turns, f"{report.most_turns} at most in one sample"),
        ("images", report.distinct_images, f"{report.images:,} mentions"),
        ("  missing", report.missing_images, ""),
        ("  broken", report.broken_images, ""),
        *(
            (("videos", report.distinct_videos, f"{report.videos:,} mentions"),)
            if report.videos
            else ()
        ),
        ("duplicate ids", report.duplicate_ids, ""),
        ("cut samples", report.cut, f"longer than {report.max_length:,} tokens"),
        ("nothing learned", report.nothing_learned, ""),
    ):
        head.add_row(name, f"{value:,}", remark)
    yield head
    for title, tokens in (("tokens", report.tokens), ("learned tokens", report.learned_tokens)):
        if tokens is not None:
            yield _histogram(title, tokens, report)
    for sort in report.findings:
        what = "stops a training" if sort.stops else "does not stop a training"
        yield Text(shown(f"{sort.sort}: {sort.count:,} ({what})"), "bold")
        yield from (
            Text(shown(f"  {message}".replace("\n", r"\n"))) for message in sort.messages[:_SHOWN]
        )
        if sort.count > _SHOWN:
            yield Text(f"  and {sort.count - _SHOWN:,} more; --json lists {KEPT} of each sort")
    yield Text(f"{report.rows:,} rows in {report.seconds:,.1f} s")


def _histogram(title: str, tokens: Tokens, report: Report) -> object:
    from rich.table import Table

    images = f"{report.visual_tokens} an image"
    if report.tiling is not None:
        images = f"images by `{report.tiling}` of views with {report.visual_tokens}"
    table = Table(
        title=f"{title} a sample, by {report.counted_with}, {images}: "
        f"mean {tokens.mean:,}, median {tokens.median:,}, 95 % {tokens.p95:,}, "
        f"longest {tokens.longest:,}, total {tokens.total:,}",
        title_justify="left",
        show_header=False,
        box=None,
    )
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    ends: Sequence[int] = [*tokens.edges[1:], tokens.longest + 1]
    for begin, end, count in zip(tokens.edges, ends, tokens.counts, strict=True):
        bar = "█" * round(40 * count / max(tokens.counts))
        table.add_row(f"{begin:,} – {end - 1:,}", f"{count:,}", bar)
    return table
