"""Proves that an exported folder computes what the model computes, or finds what differs first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from llavakit import ModelError, pack
from llavakit.contracts.data import IMAGE
from llavakit.contracts.packing import KVCache, Packing
from llavakit_plugins.onnx.exporter.images import sample_images
from llavakit_plugins.onnx.runtime import OnnxModel

if TYPE_CHECKING:
    from llavakit import LlavaModel

FloatArray = npt.NDArray[np.float32]
NEW_TOKENS = 32
_TEXTS = (
    "Tell me of the sea, and of what lives in it.",
    f"{IMAGE}\nWhat is in the picture?",
    f"Here is {IMAGE}\nand here is {IMAGE}\nWhich of the two is brighter, and why?",
)


@dataclass(frozen=True)
class Case:
    """A prompt with its logits `[T, V]` and its greedy tokens by PyTorch."""

    text: str
    images: Sequence[Image.Image]
    logits_TV: FloatArray
    tokens: Sequence[int]


@dataclass(frozen=True)
class Figures:
    """How close one precision is to PyTorch in float32."""

    largest: float
    """Largest absolute difference of a logit."""
    mean: float
    """Mean absolute difference of the logits."""
    agreement: float
    """Share of the rows whose most likely token is the same, 0 to 1."""
    tokens: float
    """Share of the greedy tokens before the first that differs, 0 to 1."""

    def table(self) -> dict[str, float]:
        return asdict(self)


def cases(model: LlavaModel) -> list[Case]:
    """Return prompts without an image, with one and with two, those that fit into the context.

    Raises ModelError if none fits.
    """
    found = []
    for text in _TEXTS:
        images = sample_images(text.count(IMAGE))
        encoded = model.prompt(text, images, raw=True)
        if encoded.length(model.visual_tokens) + NEW_TOKENS > model.language.max_length:
            continue
        logits = model.logits(text, images, raw=True).cpu().numpy()
        tokens = model.generate_ids(text, images, max_new_tokens=NEW_TOKENS, raw=True)
        found.append(Case(text, images, logits, tokens))
    if not found:
        raise ModelError(
            f"no prompt to prove the export with fits into the {model.language.max_length} tokens "
            "that the language model reads; give it a longer `max_length`"
        )
    return found


def compare(exported: OnnxModel, tried: Sequence[Case]) -> Figures:
    """Return how close an exported model is to PyTorch on these cases."""
    differences, same, together, count = [], [], 0, 0
    for case in tried:
        logits_TV = exported.logits(case.text, case.images, raw=True)
        differences.append(np.abs(logits_TV - case.logits_TV))
        same.append(logits_TV.argmax(-1) == case.logits_TV.argmax(-1))
        tokens = exported.generate_ids(case.text, case.images, max_new_tokens=NEW_TOKENS, raw=True)
        pairs = list(zip(tokens, case.tokens, strict=False))
        together += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        count += max(len(tokens), len(case.tokens))
    return Figures(
        largest=float(max(difference.max() for difference in differences)),
        mean=float(np.mean([difference.mean() for difference in differences])),
        agreement=float(np.concatenate(same).mean()),
        tokens=together / count,
    )


def first_difference(model: LlavaModel, exported: OnnxModel, case: Case, tolerance: float) -> str:
    """Return the name of the first part whose output differs from PyTorch's.

    Keys and values of each layer are compared, because the cache is what a graph returns of its
    inner layers.
    """
    encoded = model.prompt(case.text, case.images, raw=True)
    batch = pack([encoded], [0], model.visual_tokens)
    with torch.inference_mode():
        pixels = model.prepare(case.images)
        if pixels is not None:
            features = model.connector(model.features(pixels)).numpy()
            if np.abs(exported.features(pixels.numpy()) - features).max() > tolerance:
                return "the output of vision encoder and connector"
        embeds_TE = model.embed(batch, None if pixels is None else model.features(pixels))
        ours_TE = exported.embed(encoded, exported.prepare(case.images))
        if np.abs(ours_TE - embeds_TE.numpy()).max() > tolerance:
            return "the embeddings of the text or the preparation of the images"
        layers, _, _ = model.language.cache_shape()
        rows = len(embeds_TE)
        cache = KVCache(layers, [rows])
        packing = Packing(batch.packing.starts, batch.packing.position_ids_T, cache)
        model.language.hidden(embeds_TE, packing)
    _, held = exported.trace(ours_TE)
    for layer in range(layers):
        for what, ours, theirs in (
            ("keys", held[2 * layer], cache.keys[layer]),
            ("values", held[2 * layer + 1], cache.values[layer]),
        ):
            assert theirs is not None
            if np.abs(ours[:, :, :rows] - theirs[:, :, :rows].numpy()).max() > tolerance:
                before = f"the output of layer {layer - 1}" if layer else "the first norm"
                return f"the {what} of layer {layer} (or {before})"
    return f"the output of layer {layers - 1}, the last norm or the head"


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
                if (found_images := len(candidate.features(pixels))) != images:
                    raise ModelError(
                        f"connector `{model.connector.name}` gives embeddings of {found_images} "
                        f"images for {images}: it took their number for a constant while it was "
                        "traced; take it from the input (`x.shape[0]`, -1) in its `forward`"
                    )
            figures = compare(candidate, tried)
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            line = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"the ONNX graphs of {precision} do not run ({line:.300}): connector "
                f"`{model.connector.name}`, or vision encoder `{model.vision.name}`, took a size "
                "for a constant while it was traced; take the number of images from the input "
                "(`x.shape[0]`, -1) in its `forward`; nothing was written"
            ) from error
        if precision == "fp32" and (figures.largest > tolerance or figures.tokens < 1.0):
            worst = max(
                tried,
                key=lambda case: float(
                    np.abs(
                        candidate.logits(case.text, case.images, raw=True) - case.logits_TV
                    ).max()
                ),
            )
            where = first_difference(model, candidate, worst, tolerance)
            raise ModelError(
                f"the ONNX graphs differ from PyTorch: logits by up to {figures.largest:.2g} "
                f"(allowed {tolerance:g}), {figures.tokens:.0%} of the greedy tokens equal; what "
                f"differs first is {where}; nothing was written"
            )
        limit = limits[precision]
        if figures.agreement < limit:
            raise ModelError(
                f"precision {precision} agrees with PyTorch on the likeliest token in "
                f"{figures.agreement:.1%} of the rows, fewer than {limit:.1%}; leave it out, use "
                f"smaller blocks, or lower `least_agreement`; nothing was written"
            )
        found[precision] = figures.table()
    return found
