"""`llava-run chat`: asks a model about images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llavakit import printable, shown
from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import LlavaError, ModelError
from llavakit_plugins.commands.flags import add_model, add_settings, load_model, table_of


def add(commands: Commands) -> None:
    chat = commands.add_parser("chat", help="ask a model about images")
    add_model(chat, "model")
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
    add_settings(chat, "change an option of a part, for example language.quantize=nf4")
    chat.set_defaults(command=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.heatmap is not None and (arguments.prompt is None or not arguments.image):
        raise LlavaError("--heatmap draws one answer over its image: give --prompt and --image too")
    model = load_model(arguments.model, arguments, arguments.device, table_of(arguments.set))
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
        print(printable(model.generate(arguments.prompt, images=arguments.image, **settings)))
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
                print(printable(piece), end="", flush=True)
            print()
        except LlavaError as error:  # of this question; the next may do
            print(f"error: {shown(str(error))}", file=sys.stderr)


def _chat_with_heatmap(arguments: argparse.Namespace, model: object) -> None:
    from llavakit import LlavaModel
    from llavakit.contracts.model import Sampling
    from llavakit_plugins.heatmaps.attention_maps import map_attention
    from llavakit_plugins.heatmaps.drawing import draw_attention_maps
    from llavakit_plugins.reporting.pictures import save_image

    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.model} is in a layout that shows no attention; --heatmap needs a model "
            "folder, or a layout that `llava-run import` turns into one"
        )
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    maps = map_attention(model, arguments.prompt, arguments.image, sampling)
    print(
        printable(maps.answer), flush=True
    )  # first: it is not lost where the picture cannot be written
    save_image(draw_attention_maps(maps, arguments.image, model.vision), arguments.heatmap)
