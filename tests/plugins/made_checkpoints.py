"""Small random checkpoints in other projects' layouts, made with transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from torch import Tensor

from llavakit import LlavaModel
from llavakit.testing import ExporterContract
from llavakit_plugins.checkpoints.hf import Hf

SIGLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
QWEN: dict[str, Any] = {**LANGUAGE, "tie_word_embeddings": True}
COLOURS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
PROMPTS = [
    ("USER : <image> what colour is it ? ASSISTANT :", 1),
    ("USER : <image> a red circle <image> what is it in ? ASSISTANT :", 2),
    ("USER : what shape is the circle ? ASSISTANT :", 0),
]
CHAT = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] + ' ' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""Shaped like the one that LLaVA-1.5 has in transformers' layout."""


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(count)
    return [
        Image.fromarray(draw.integers(0, 255, (40 + 9 * n, 36, 3), dtype=np.uint8))
        for n in range(count)
    ]


def shaken(model: Any) -> Any:
    """Return the model with every weight moved: zero biases would hide a forgotten one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_hf(
    folder: Path,
    *,
    vision: str = "clip",
    language: str = "llama",
    dtype: torch.dtype = torch.float32,
    chat: str | None = CHAT,
    shard: str = "5GB",
    grids: Sequence[tuple[int, int]] = (),
    family: str = "",
    colours: Mapping[str, list[float]] = COLOURS,
    **config: Any,
) -> Any:
    """Save one of transformers' LLaVAs with its processor to `folder`, and return it.

    `family` is what its class has between `Llava` and `ForConditionalGeneration`: `Onevision`,
    `NextVideo`, or with `grids` of tiles `Next`, where it is left out.
    """
    import transformers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        Qwen2Config,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    clip = vision == "clip"
    strategy = "default" if clip else "full"
    table: dict[str, Any] = {"image_token_index": 22, "vision_feature_select_strategy": strategy}
    family = family or ("Next" if grids else "")
    points = [[32 * rows, 32 * columns] for rows, columns in grids]
    if grids:
        table["image_grid_pinpoints"] = points
    moves = family in ("Onevision", "NextVideo")
    if moves:
        table["video_token_index"] = 23

    def kind(suffix: str) -> Any:
        return getattr(transformers, f"Llava{family}{suffix}")

    long = {"max_position_embeddings": 1024} if grids else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = kind("Config")(
            vision_config=CLIPVisionConfig(**VISION) if clip else SiglipVisionConfig(**SIGLIP),
            text_config=LlamaConfig(**{**LANGUAGE, **long})
            if language == "llama"
            else Qwen2Config(**{**QWEN, **long}),
            **{**table, **config},
        )
        model = shaken(kind("ForConditionalGeneration")(settings)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    square = {"height": 32, "width": 32}
    pixels: Any = (
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        if clip
        else SiglipImageProcessorPil(size=square)
    )
    more: dict[str, Any] = {"patch_size": 8, "num_additional_image_tokens": int(clip)}
    if moves:
        tokenizer.add_tokens(["<video>"], special_tokens=True)
    if family in ("Next", "NextVideo"):
        cropped: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": square}
        pixels = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=points, **cropped)
        if moves:
            more["video_processor"] = transformers.LlavaNextVideoVideoProcessor(**cropped)
    if family == "Onevision":
        pixels = kind("ImageProcessorPil")(size=square, image_grid_pinpoints=points, **colours)
        more = {
            "num_image_tokens": 16 + clip,
            "vision_aspect_ratio": settings.vision_aspect_ratio,
            "video_processor": kind("VideoProcessor")(size=square, **colours),
        }
    kind("Processor")(
        image_processor=pixels,
        tokenizer=tokenizer,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        chat_template=chat,
        **more,
    ).save_pretrained(folder)
    return model


def read_processor(folder: Path) -> Any:
    """Return transformers' processor of a folder, of the PIL backend for images.

    Videos have torchvision's alone.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def ask_hf(
    processor: Any,
    prompt: str,
    images: list[Image.Image],
    videos: Sequence[Sequence[Image.Image]] = (),
) -> dict[str, Tensor]:
    """Return what transformers' own processor makes of a prompt.

    The images are those of one sample, which is a list within a list, as in its chats.
    """
    more = {}
    if videos:
        more["videos"] = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
    inputs = processor(
        text=[prompt], images=[images] if images else None, return_tensors="pt", **more
    )
    return {key: value for key, value in inputs.items() if key != "token_type_ids"}


def weight_files(folder: Path) -> Mapping[str, bytes]:
    """Return the bytes of every file of weights below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


class NativeExporter(ExporterContract):
    """The contract of a layout, for the models that the fixture `native` makes."""

    close = 1e-5

    @pytest.fixture(autouse=True)
    def _make(self, native: Callable[..., LlavaModel]) -> None:
        self._native = native

    def model(self) -> LlavaModel:
        return self._native()


def export_alike(kind: Any, model: LlavaModel, folder: Path, out: Path) -> Any:
    """Export a model that was read from `folder`; return the result, read by transformers' class.

    Fails unless answers, pixels and every byte of the weights are what they were.
    """
    figures = Hf().export(model, out)
    assert figures["largest_logit_difference"] < 1e-5
    assert figures["processor_ids_equal"] is True
    assert figures["processor_pixel_difference"] < 1e-6
    saved, back = (load_file(path / "model.safetensors") for path in (folder, out))
    back = {
        name.replace("vision_tower.vision_model.", "vision_tower."): v for name, v in back.items()
    }
    assert saved.keys() == back.keys()
    assert all(torch.equal(saved[name], back[name]) for name in saved)
    again, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    return again.eval()
