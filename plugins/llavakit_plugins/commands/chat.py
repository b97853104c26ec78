"""`llava-run chat`: asks a model about images and videos."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit import printable
from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import LlavaError, ModelError
from llavakit_plugins.commands.flags import (
    add_model,
    add_sampling,
    add_settings,
    load_model,
    sampling_of,
    table_of,
)

if TYPE_CHECKING:
    from llavakit.contracts.model import Sampling


def add(commands: Commands) -> None:
    chat = commands.add_parser("chat", help="ask a model about images and videos")
    add_model(chat, "model")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given more than once"
    )
    chat.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="or a folder of frames"
    )
    chat.add_argument("--prompt", help="ask this once and print only the answer")
    chat.add_argument("--system", metavar="TEXT", help="in place of the template's system text")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    add_sampling(chat)
    chat.add_argument("--device", default="auto")
    chat.add_argument("--verbose", action="store_true", help="say how fast the answer came")
    chat.add_argument("--upright", action="store_true", help="turn photos as the camera noted")
    chat.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST",
        help="read images of this host, by http or https",
    )  # fmt: skip
    chat.add_argument(
        "--heatmap", type=Path, metavar="PNG", help="with --prompt: draw where the model looks"
    )
    add_settings(chat, "change an option of a part, for example language.quantize=nf4")
    chat.set_defaults(command=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from llavakit import Video
    from llavakit_plugins.commands.dialogue import Dialogue, answer, talk
    from llavakit_plugins.fetching.images import ImageFetcher

    if arguments.heatmap is not None and (arguments.prompt is None or not arguments.image):
        raise LlavaError("--heatmap draws one answer over its image: give --prompt and --image too")
    # the maps lie over the file's own pixels, and are made of one pass without a conversation
    if arguments.heatmap is not None and (arguments.upright or arguments.system is not None):
        raise LlavaError(
            "--heatmap draws over the image as it is: leave --upright and --system out"
        )
    if arguments.heatmap is not None and arguments.video:
        raise LlavaError("--heatmap draws over images: leave --video out")
    sampling = sampling_of(arguments)
    model = load_model(arguments.model, arguments, arguments.device, table_of(arguments.set))
    model.upright = arguments.upright
    if arguments.heatmap is not None:
        _chat_with_heatmap(arguments, model, sampling)
        return 0
    fetch = ImageFetcher(arguments.allow_host).source
    shown = [*arguments.image, *map(Video, arguments.video)]
    dialogue = Dialogue(model, asdict(sampling), shown, arguments.system, fetch)
    if arguments.prompt is None:
        talk(dialogue, verbose=arguments.verbose)
    else:
        answer(dialogue, arguments.prompt, verbose=arguments.verbose)
    return 0


def _chat_with_heatmap(arguments: argparse.Namespace, model: object, sampling: Sampling) -> None:
    from llavakit import LlavaModel
    from llavakit_plugins.heatmaps.attention_maps import map_attention
    from llavakit_plugins.heatmaps.drawing import draw_attention_maps
    from llavakit_plugins.reporting.pictures import save_image

    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.model} is in a layout that shows no attention; --heatmap needs a model "
            "folder, or a layout that `llava-run import` turns into one"
        )
    maps = map_attention(model, arguments.prompt, arguments.image, sampling)
    # first, so that the answer is not lost where the picture cannot be written
    print(printable(maps.answer), flush=True)
    save_image(draw_attention_maps(maps, arguments.image, model.vision), arguments.heatmap)
