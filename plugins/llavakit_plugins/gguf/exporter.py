"""Writes a model as the two GGUF files that llama.cpp's multimodal tools read.

    model-f16.gguf     the language model, its tokenizer and chat template
    mmproj-f16.gguf    the vision encoder and the projector

The rules are those of llama.cpp at 0c1e57098 (`tools/mtmd/clip.cpp`, `tools/mtmd/models/llava.cpp`,
`conversion/`), as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from llavakit import Exporter, ModelError, Options, new_folder
from llavakit_plugins.language.at_hand import tokenizer_at_hand

if TYPE_CHECKING:
    from llavakit import LlavaModel
    from llavakit_plugins.vision.vision_transformer import TransformersEncoder

_log = logging.getLogger("llavakit")
_SQUARE = {
    "crop": "cut to the square in their middle",
    "squash": "stretched to a square",
}


class GgufOptions(Options):
    """Options of `gguf`."""

    type: Literal["f32", "f16", "q8_0"] = "f16"
    """Of the language model's matrices; vectors are always `f32`."""
    vision_type: Literal["f32", "f16", "q8_0"] = "f16"
    """Of the matrices of the vision encoder and the projector."""


class Gguf(Exporter):
    """Two files for llama.cpp: the language model, and vision encoder with projector."""

    name = "gguf"
    Options = GgufOptions
    options: GgufOptions

    def check(self, model: LlavaModel) -> None:
        """Raise ModelError for a model that llama.cpp's LLaVA has no place for."""
        needs_gguf()
        from llavakit_plugins.gguf.language import language_tensors
        from llavakit_plugins.gguf.vision import projector, vision_tensors
        from llavakit_plugins.gguf.vocabulary import check_tokenizer

        language_tensors(model.language)
        vision_tensors(model.vision)
        projector(model)
        if (tokenizer := tokenizer_at_hand(model.language)) is not None:
            check_tokenizer(tokenizer)

    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        """Write both files, read every tensor back, and return how far each type is off.

        Raises ModelError for a model without a place in them, or where a tensor does not read back
        within the rounding of its type.
        """
        needs_gguf()
        from llavakit_plugins.gguf.files import write_file
        from llavakit_plugins.gguf.language import architecture, describe_language, language_tensors
        from llavakit_plugins.gguf.vision import describe_vision, projector, vision_tensors
        from llavakit_plugins.gguf.vocabulary import remarks

        language, vision = language_tensors(model.language), vision_tensors(model.vision)
        vision |= projector(model)
        learned = cast("TransformersEncoder", model.vision).learned
        # mtmd has no other preparation for this projector: the file cannot ask for a crop
        if learned["aspect"] != "pad":
            _log.warning(
                "llama.cpp pads every image to a square, and this model learned from images with "
                '`vision.aspect = "%s"`: give llama.cpp images %s, or expect other answers',
                learned["aspect"], _SQUARE[learned["aspect"]],
            )  # fmt: skip
        if learned["fast"]:
            _log.warning(
                "llama.cpp resizes every image whole, and this model learned from images with "
                "`vision.fast = true`, 2 to 3 of 255 levels off on average: expect other answers, "
                "or train it with `fast = false`"
            )
        for sentence in remarks(model.language):
            _log.warning("%s", sentence)
        own, other = self.options.type, self.options.vision_type
        figures: dict[str, float] = {}
        with new_folder(folder) as fresh:
            for apart in (
                write_file(
                    fresh / f"model-{own}.gguf", architecture(model), own, language,
                    partial(describe_language, model=model),
                ),
                write_file(
                    fresh / f"mmproj-{other}.gguf", "clip", other, vision,
                    partial(describe_vision, model=model),
                ),
            ):  # fmt: skip
                for of, value in apart.items():
                    figures[of] = max(value, figures.get(of, 0.0))
        tensors_written = len(language) + len(vision)
        return {"tensors": tensors_written, **{f"largest_error_{k}": v for k, v in figures.items()}}


def needs_gguf() -> None:
    """Raise ModelError if the library of the extra `gguf` is not installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("this needs gguf; install it with `pip install 'llavakit[gguf]'`")
