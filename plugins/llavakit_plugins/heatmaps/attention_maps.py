"""Where a model looks while it answers: attention from the answer's tokens to image patches.

A tokens of the answer, I images, G edge of an image's grid of visual tokens, T rows of the stream,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llavakit.contracts.data import ImageSource
from llavakit.contracts.errors import ModelError
from llavakit.contracts.model import Sampling
from llavakit.model.llava import LlavaModel
from llavakit.stream.attention import Watch
from llavakit.stream.batch import pack
from llavakit.stream.encode import Encoded


@dataclass(frozen=True)
class Gaze:
    """An answer, and how much of its attention went where."""

    answer: str
    pieces: tuple[str, ...]
    """The text of each token."""
    weights_AIGG: Tensor
    """Share of a token's attention that went to each visual token, float32 on the CPU: the mean
    over layers and heads of the row that the token was chosen from."""

    @property
    def words(self) -> list[tuple[str, Tensor]]:
        """The answer word by word, each with the mean `[I, G, G]` over its tokens."""
        starts = [
            place
            for place, piece in enumerate(self.pieces)
            if place == 0 or (piece[:1].isspace() and piece.strip())
        ]
        ends = [*starts[1:], len(self.pieces)]
        words = [
            ("".join(self.pieces[start:end]).strip(), self.weights_AIGG[start:end].mean(dim=0))
            for start, end in zip(starts, ends, strict=True)
        ]
        return [(word, weights) for word, weights in words if word]


def watch_answer(
    model: LlavaModel,
    prompt: str,
    images: Sequence[ImageSource],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
) -> Gaze:
    """Answer a prompt, and say where each token of the answer looked.

    Raises ModelError where the visual tokens are no grid, or the language model keeps its attention
    to itself.
    """
    if not images:
        raise ModelError("there is no image to look at; give one with --image")
    edge = grid_edge(model)
    encoded = model.prompt(prompt, images, raw=raw)
    ids = model.answer_ids([(prompt, images)], sampling or Sampling(), raw=raw)[0]
    weights_AT, visual_rows_N = _attention(model, encoded, images, ids)
    pieces: list[str] = []
    for end in range(1, len(ids) + 1):
        text = str(model.language.tokenizer.decode(ids[:end], skip_special_tokens=True))
        pieces.append(text[sum(map(len, pieces)) :])
    weights_AIGG = weights_AT[:, visual_rows_N].unflatten(1, (len(images), edge, edge))
    return Gaze(model.decode(ids), tuple(pieces), weights_AIGG)


def grid_edge(model: LlavaModel) -> int:
    """Return how many visual tokens an image has across, and down.

    Raises ModelError where they are no square that divides the patches into equal parts.
    """
    tokens = model.visual_tokens
    patches = model.vision.tokens(model.vision.image_size)
    edge, across = math.isqrt(tokens), math.isqrt(patches)
    if edge**2 != tokens or across**2 != patches or across % edge:
        raise ModelError(
            f"`{model.connector.name}` makes {tokens} visual tokens of {patches} patches: each "
            "stands for no place of its own in the image, so no heat map can be drawn"
        )
    return edge


@torch.inference_mode()
def _attention(
    model: LlavaModel, encoded: Encoded, images: Sequence[ImageSource], ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the attention `[A, T]` of the rows that `ids` were chosen from, and the visual rows.

    The answer is read again in one pass. Its last token is left out: nothing was chosen from it.
    """
    read = np.asarray(ids[:-1], dtype=np.int64)
    whole = Encoded(
        np.concatenate([encoded.ids, read]),
        np.concatenate([encoded.learned, np.zeros(len(read), np.bool_)]),
    )
    batch = pack([whole], [0], model.visual_tokens).to(model.device)
    length = batch.packing.starts[-1]
    watch = Watch(torch.arange(length - len(ids), length, device=model.device))
    packing = replace(batch.packing, watch=watch)
    pixels = model.prepare(images)
    features = None if pixels is None else model.features(pixels)
    model.language.hidden(model.embed(batch, features), packing)
    layers, _, _ = model.language.cache_shape()
    if len(watch.weights) != layers:
        raise ModelError(
            f"language model `{model.language.name}` showed the attention of {len(watch.weights)} "
            f"of its {layers} layers: it must attend by llavakit.stream.attention.packed_attention"
        )
    weights_LAT = torch.stack([weights.mean(dim=0) for weights in watch.weights.values()])
    return weights_LAT.mean(dim=0).cpu(), batch.visual_rows_N.cpu()
