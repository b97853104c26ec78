"""How a step's images become pixels: the model's way, or a changed one. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llavakit import Build, Options, TrainingError, Use
from llavakit_plugins.huggingface.products import ProductOptions
from llavakit_plugins.outlines.weights import Outline
from llavakit_plugins.vision.options import EncoderOptions, TransformersOptions

if TYPE_CHECKING:
    from llavakit import LlavaModel, VisionEncoder

_NO_PIXELS: Mapping[type[Options], tuple[str, ...]] = {
    EncoderOptions: ("layer", "norm", "select", "dtype"),
    ProductOptions: ("products",),
    TransformersOptions: ("config",),
}
"""Options of encoders that say nothing about pixels, by the class that brings them."""


def preparation(model: LlavaModel, changes: Mapping[str, Any], build: Build) -> VisionEncoder:
    """Return the encoder whose `prepare` is used: the model's, or a copy with changed options.

    A copy is built on the meta device and has no weights. Raises TrainingError if the encoder has
    no such options, or if they change the size of the images that it reads, or no pixel at all.
    """
    if not changes:
        return model.vision
    choice = {**model.choices["vision"], **changes}
    try:
        with nullcontext() if isinstance(model.vision, Outline) else _on_meta():
            changed = build(Use["VisionEncoder"].model_validate(choice), shapes=True)
    except ValidationError as error:
        faults = "; ".join(f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors())
        raise TrainingError(f"`prepare` of `{model.vision.name}`: {faults}; fix it") from error
    if changed.image_size != model.vision.image_size:
        raise TrainingError(
            f"`prepare` changes the size of images to {changed.image_size}, but the encoder reads "
            f"{model.vision.image_size}; change it under [model.vision]"
        )
    own = type(model.vision).Options
    idle = {name for kind, names in _NO_PIXELS.items() if issubclass(own, kind) for name in names}
    if found := [name for name in changes if name in idle]:
        raise TrainingError(
            f"`prepare` of `{model.vision.name}`: `{found[0]}` changes no pixels, and that is all "
            "a step can change; change it under [model.vision], or leave it out"
        )
    return changed


def _on_meta() -> AbstractContextManager[Any]:
    """Return torch's meta device, to build networks of shapes alone."""
    import torch

    return torch.device("meta")
