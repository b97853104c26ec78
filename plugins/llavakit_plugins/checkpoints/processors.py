"""Writes transformers' processor: the tokenizer, the chat template, and how images are prepared."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from llavakit_plugins.checkpoints.families import LLAVA, ONEVISION, VIDEO
from llavakit_plugins.checkpoints.pinpoints import Grids
from llavakit_plugins.huggingface.tokenizer_writing import complete_tokenizer
from llavakit_plugins.vision.pixels import make_processor
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

_FILE = "processor_config.json"
_log = logging.getLogger("llavakit")


def strategy_of(vision: TransformersEncoder) -> str:
    """Return `vision_feature_select_strategy`."""
    return "default" if vision.prefix_tokens else "full"


def write_processor(
    vision: TransformersEncoder, tokenizer: Any, chat: str | None, grids: Grids, folder: Path
) -> None:
    """Write processor_config.json with all that transformers 5 reads, and what earlier ones do."""
    from transformers import LlavaNextProcessor, LlavaProcessor

    if vision.square.fast:
        _log.warning(
            "the model's images are shrunk fast (`vision.fast`), which transformers does not do: "
            "there its pixels differ by 2 to 3 of 255 levels on average; train it with "
            "`fast = false` to answer alike"
        )
    family = grids.family
    kind: Any = LlavaProcessor if family is LLAVA else LlavaNextProcessor
    extra = vision.prefix_tokens + vision.kept
    processor = kind(
        make_processor(vision.square, grids.points, whole=family is ONEVISION),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy_of(vision),
        num_additional_image_tokens=extra,
        chat_template=chat,
    )
    processor.save_pretrained(folder)
    complete_tokenizer(tokenizer, folder, as_imported=False)
    table = json.loads((folder / _FILE).read_text("utf-8"))
    images = table["image_processor"]
    if family is ONEVISION:
        del table["patch_size"], table["num_additional_image_tokens"]
        table["num_image_tokens"] = (vision.image_size // vision.patch_size) ** 2 + extra
        table["vision_aspect_ratio"] = f"anyres_max_{grids.cap}"
    if VIDEO in family.tokens:
        name = "VideoProcessor" if family is ONEVISION else "VideoVideoProcessor"
        table |= {
            "processor_class": f"{family.prefix}Processor",
            "video_token": VIDEO,
            "video_processor": _frames(images, f"{family.prefix.removesuffix('Video')}{name}"),
        }
        _write(folder / _FILE, table)
    _write(folder / "preprocessor_config.json", images)


def _frames(images: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return how each frame of a video is prepared: as an image that is one view.

    By hand, since transformers makes its video processors with torchvision alone.
    """
    others = ("image_grid_pinpoints", "image_processor_type", "do_pad")
    own = {key: value for key, value in images.items() if key not in others}
    return {**own, "do_sample_frames": False, "video_processor_type": kind}


def _write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
