"""Proves that an exported folder computes what the model computes, or finds what differs first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from llavakit import ModelError
from llavakit_plugins.checkpoints.parity import Case, Figures, compare
from llavakit_plugins.onnx.exporter.cache import embed_prompt, held_of
from llavakit_plugins.onnx.exporter.graphs import pools_features
from llavakit_plugins.onnx.runtime import OnnxModel
from llavakit_plugins.onnx.runtime.folder import Folder
from llavakit_plugins.onnx.runtime.layout import SMALL_CACHE, graph_file

if TYPE_CHECKING:
    from llavakit import LlavaModel

NEW_TOKENS = 32


def table(figures: Figures) -> dict[str, float]:
    """Return the figures of one precision, as the report has them; `tokens` is a share."""
    return {
        "largest": figures.largest,
        "mean": figures.mean,
        "agreement": figures.agreement,
        "tokens": figures.same_tokens / figures.all_tokens,
    }


def first_difference(model: LlavaModel, exported: OnnxModel, case: Case, tolerance: float) -> str:
    """Return the name of the first part whose output differs from PyTorch's.

    Keys and values of each layer are compared, because the cache is what a graph returns of its
    inner layers.
    """
    with torch.inference_mode():
        pixels = model.prepare(case.images)
        if pixels is not None:
            features = model.features(pixels)
            apart = pools_features(model)
            what = "the vision encoder" if apart else "vision encoder and connector"
            ours = exported.features(pixels.numpy())
            theirs = (features if apart else model.connector(features)).numpy()
            if np.abs(ours - theirs).max() > tolerance:
                return f"the output of {what}"
            if apart:
                theirs = model.connector(features).flatten(0, 1).numpy()
                if np.abs(exported.connect(ours, None) - theirs).max() > tolerance:
                    return "the output of the connector"
        embeds_TE = embed_prompt(model, case)
        cache = held_of(model, embeds_TE)
    encoded = model.prompt(case.text, case.images, raw=case.raw)
    ours_TE = exported.embed(encoded, exported.prepare(case.images))
    if np.abs(ours_TE - embeds_TE.numpy()).max() > tolerance:
        return "the embeddings of the text or the preparation of the images"
    _, held = exported.trace(ours_TE)
    for number, (ours, theirs) in enumerate(zip(held, cache, strict=True)):
        if np.abs(ours[:, :, : len(embeds_TE)] - theirs.numpy()).max() > tolerance:
            layer, what = number // 2, "values" if number % 2 else "keys"
            before = f"the output of layer {layer - 1}" if layer else "the first norm"
            return f"the {what} of layer {layer} (or {before})"
    return f"the output of layer {len(cache) // 2 - 1}, the last norm or the head"


def prove(
    model: LlavaModel, exported: Mapping[str, OnnxModel], limits: Mapping[str, float],
    tolerance: float, tried: Sequence[Case],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the figures of each precision.

    Raises ModelError if logits of fp32 differ by more than `tolerance` or its greedy tokens differ,
    or if another precision agrees in fewer rows than its limit.
    """
    found = {}
    for precision, candidate in exported.items():
        try:
            for images in (1, 3):  # it was traced with two
                pixels = np.zeros((images, 3, *(model.vision.image_size,) * 2), np.float32)
                if (found_images := _images(candidate, pixels)) != images:
                    raise ModelError(
                        f"connector `{model.connector.name}` gives embeddings of {found_images} "
                        f"images for {images}: it took their number for a constant while it was "
                        "traced; take it from the input (`x.shape[0]`, -1) in its `forward`"
                    )
            figures = compare(candidate, tried)
        except ModelError as error:
            if error.__cause__ is None:  # ours; else onnxruntime's, whose words tell more
                raise
            line = str(error.__cause__).strip().partition("\n")[0]
            raise ModelError(
                f"the ONNX graphs of {precision} do not run ({line:.300}): connector "
                f"`{model.connector.name}`, or vision encoder `{model.vision.name}`, took a size "
                "for a constant while it was traced; take the number of images from the input "
                "(`x.shape[0]`, -1) in its `forward`; nothing was written"
            ) from error
        tokens = figures.same_tokens / figures.all_tokens
        if precision == "fp32" and not (figures.largest <= tolerance and tokens == 1.0):
            where = first_difference(model, candidate, figures.worst, tolerance)
            raise ModelError(
                f"the ONNX graphs differ from PyTorch: logits by up to {figures.largest:.2g} "
                f"(allowed {tolerance:g}), {tokens:.0%} of the greedy tokens equal; what "
                f"differs first is {where}; nothing was written"
            )
        limit = limits[precision]
        if figures.agreement < limit:
            raise ModelError(
                f"precision {precision} agrees with PyTorch on the likeliest token in "
                f"{figures.agreement:.1%} of the rows, fewer than {limit:.1%}; leave it out, use "
                f"smaller blocks, or lower `least_agreement`; nothing was written"
            )
        found[precision] = table(figures)
    return found


def small_cache(
    folder: Folder, precision: str, limit: float, tried: Sequence[Case]
) -> dict[str, float] | None:
    """Return the figures of a precision with its second decoder, whose cache has 8 bits.

    None, and the decoder is deleted, where it agrees in fewer rows than the limit, which the first
    one keeps.
    """
    name = graph_file(SMALL_CACHE, precision)
    listed = folder.manifest.model_copy(update={"sha256": {name: ""}})
    figures = compare(OnnxModel(Folder(folder.path, listed), precision), tried)
    if figures.agreement >= limit:
        return table(figures)
    logging.getLogger(__name__).warning(
        "with keys and values in 8 bits %s agrees with PyTorch on the likeliest token in %.1f %% "
        "of the rows, fewer than %.1f %%: it is exported with a cache in float alone",
        precision, 100 * figures.agreement, 100 * limit,
    )  # fmt: skip
    folder.file(name).unlink()
    return None


def _images(exported: OnnxModel, pixels_IHW: npt.NDArray[np.float32]) -> int:
    """Return of how many images the embeddings are that a model gives for some."""
    found_NE = exported.connect(exported.features(pixels_IHW), None)
    return len(found_NE) // exported.visual_tokens
