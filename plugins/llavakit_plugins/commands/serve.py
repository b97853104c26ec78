"""`llava-run serve`: answers OpenAI's chat completions over HTTP, and a page to chat on."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import LlavaError
from llavakit_plugins.commands.flags import add_model, add_settings, load_model, table_of

_NEEDS = ("starlette", "uvicorn")


def add(commands: Commands) -> None:
    serve = commands.add_parser("serve", help="serve a model over HTTP, with a web chat")
    add_model(serve, "model")
    serve.add_argument(
        "--host", default="127.0.0.1", help="127.0.0.1: this machine alone (default)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 is any that is free")
    serve.add_argument("--name", help="what clients call the model (default: its folder's name)")
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key on each line")
    serve.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="another site whose pages may ask",
    )  # fmt: skip
    serve.add_argument(
        "--allow-image-host", action="append", default=[], metavar="HOST",
        help="a public host that images may be fetched from",
    )  # fmt: skip
    serve.add_argument("--device", default="auto")
    serve.add_argument("--threads", type=int, metavar="N", help="CPU threads of the model")
    limits = serve.add_argument_group("limits (docs/serving.md)")
    for flag, kind, sentence in _LIMITS:
        limits.add_argument(flag, type=kind, metavar="N", help=sentence)
    serve.add_argument(
        "--log-requests", action="store_true", help="log what is asked; else no text is logged"
    )
    add_settings(serve, "change an option of a part, for example language.quantize=nf4")
    serve.set_defaults(command=_serve)


_LIMITS: tuple[tuple[str, Any, str], ...] = (
    ("--places", int, "answers written at once (16)"),
    ("--queue", int, "requests that may wait (64); more get status 429"),
    ("--chunk", int, "rows of prompts read between two tokens of others (256)"),
    ("--cache-rows", int, "rows of the key-value cache (by memory)"),
    ("--max-tokens", int, "tokens of an answer"),
    ("--max-body-mb", float, "megabytes of a request (32)"),
    ("--max-image-megapixels", float, "of one image (50)"),
    ("--max-video-megapixels", float, "of all frames of one video (5000)"),
    ("--max-images", int, "images and videos of a request (8)"),
    ("--timeout", float, "seconds of a request (600)"),
    ("--grace", float, "seconds for running answers when the server stops (20)"),
)
_FIELDS = {
    "places": ("places", 1), "queue": ("queue", 1), "chunk": ("chunk", 1),
    "cache_rows": ("cache_rows", 1), "max_tokens": ("tokens", 1),
    "max_body_mb": ("body_bytes", 10**6), "max_image_megapixels": ("image_pixels", 10**6),
    "max_video_megapixels": ("video_pixels", 10**6), "max_images": ("images", 1),
    "timeout": ("seconds", 1), "grace": ("grace_seconds", 1),
}  # fmt: skip


def _serve(arguments: argparse.Namespace) -> int:
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise LlavaError(
            f"serving needs {' and '.join(missing)}; install with `pip install 'llavakit[serve]'`"
        )
    # A thread that waits for others must not hold its core: the event loop needs it, and a step of
    # a small model takes a hundred times as long where they fight. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from llavakit import shown
    from llavakit_plugins.fetching.images import ImageFetcher
    from llavakit_plugins.serving.guard import Guard, is_loopback, read_keys
    from llavakit_plugins.serving.limits import Limits
    from llavakit_plugins.serving.server import Serving, listen, run

    given: dict[str, Any] = {}
    for flag, (field, factor) in _FIELDS.items():
        value = getattr(arguments, flag)
        if value is not None:
            least = "0 or more" if flag == "grace" else "more than 0"
            if not 0 <= value < inf or (value == 0 and flag != "grace"):
                raise LlavaError(f"--{flag.replace('_', '-')} {value:g}: give {least}")
            given[field] = value if factor == 1 else int(value * factor)
    if arguments.threads is not None and arguments.threads < 1:
        raise LlavaError(f"--threads {arguments.threads}: give 1 or more")
    limits = Limits(**given)
    keys = read_keys(arguments.api_key_file) if arguments.api_key_file is not None else []
    guard = Guard(host=arguments.host, keys=keys, origins=arguments.allow_origin)
    ImageFetcher(arguments.allow_image_host)  # what is no host is said before a model is loaded
    with listen(arguments.host, arguments.port) as listener:  # first: loading may take minutes
        if not keys and not is_loopback(arguments.host):
            _say("warning: whoever reaches this address may ask; give --api-key-file")
        if arguments.threads is not None:
            import torch

            torch.set_num_threads(arguments.threads)
        model = load_model(arguments.model, arguments, arguments.device, table_of(arguments.set))
        name = arguments.name or arguments.model.resolve().name
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("llavakit.serving").setLevel(logging.INFO)
        logging.getLogger("llavakit_plugins.serving").setLevel(logging.INFO)
        serving = Serving(
            model, name, guard, limits, arguments.allow_image_host, arguments.log_requests
        )
        return run(serving, listener, lambda address: _say(shown(f"serving {name} on {address}")))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
