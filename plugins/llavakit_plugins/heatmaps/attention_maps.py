"""Attention maps: the attention from the tokens of an answer to the patches of the images.

Shapes: A tokens of the answer, I images, G edge of an image's grid of visual tokens, T rows of the
stream, L layers, H heads, R chosen rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavakit import Encoded, LlavaModel, pack
from llavakit.contracts.data import ImageSource
from llavakit.contracts.errors import ModelError
from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import Packing, Scoring


@dataclass(frozen=True)
class AttentionMaps:
    """An answer, and the attention of its tokens to the images."""

    answer: str
    pieces: tuple[str, ...]
    """The text of each token."""
    weights_AIGG: Tensor
    """Share of a token's attention on each visual token, float32, on the CPU: the mean over layers
    and heads, for the row that predicted the token."""
    whole: bool = False
    """Whether a grid covers all of an image, as the base view of a tiling does."""

    @property
    def words(self) -> list[tuple[str, Tensor]]:
        """The answer word by word, each with the mean `[I, G, G]` over its tokens."""
        starts = [
            index
            for index, piece in enumerate(self.pieces)
            if index == 0 or (piece[:1].isspace() and piece.strip())
        ]
        ends = [*starts[1:], len(self.pieces)]
        words = [
            ("".join(self.pieces[start:end]).strip(), self.weights_AIGG[start:end].mean(dim=0))
            for start, end in zip(starts, ends, strict=True)
        ]
        return [(word, weights) for word, weights in words if word]


class WatchedRows:
    """Keeps the attention weights of chosen rows of a stream, layer by layer.

    They are computed here, because fused attention does not return weights.
    """

    def __init__(self, rows_R: Tensor) -> None:
        self.rows_R = rows_R
        self.weights: dict[int, Tensor] = {}
        """`[H, R, T]`, float32, by layer."""

    @torch.no_grad()
    def see(
        self,
        layer: int,
        q_THK: Tensor,
        k_TGK: Tensor,
        packing: Packing,
        scoring: Scoring,
    ) -> None:
        """Compute the weights of one layer for the chosen rows alone."""
        scale = q_THK.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        # few rows: all of them would be T x T for each head
        q_RHK = q_THK.index_select(0, self.rows_R).float()
        # grouped-query attention: heads of a group share a key
        k_THK = k_TGK.float().repeat_interleave(q_THK.shape[1] // k_TGK.shape[1], dim=1)
        scores_HRT = torch.einsum("rhk,thk->hrt", q_RHK, k_THK) * scale
        if scoring.softcap is not None:
            scores_HRT = scoring.softcap * torch.tanh(scores_HRT / scoring.softcap)
        sample_T, positions_T = packing.samples_T, packing.position_ids_T
        distance_RT = positions_T[self.rows_R][:, None] - positions_T[None, :]
        visible_RT = distance_RT >= 0
        if scoring.window is not None:
            visible_RT &= distance_RT < scoring.window
        visible_RT &= sample_T[self.rows_R][:, None] == sample_T[None, :]
        scores_HRT = scores_HRT.masked_fill(~visible_RT, -torch.inf)
        if scoring.sinks_H is not None:
            sinks_HR1 = scoring.sinks_H.float()[:, None, None].expand(-1, len(self.rows_R), 1)
            scores_HRT = torch.cat([scores_HRT, sinks_HR1], dim=-1)
        # what a sink takes goes to no row
        self.weights[layer] = scores_HRT.softmax(dim=-1)[..., : len(positions_T)]


class _MeanOfHeads(WatchedRows):
    """Keeps `[R, T]` of each layer: all heads of a long answer would fill the memory."""

    def see(self, layer: int, *seen: Any) -> None:
        super().see(layer, *seen)
        self.weights[layer] = self.weights[layer].mean(dim=0)


def map_attention(
    model: LlavaModel,
    prompt: str,
    images: Sequence[ImageSource],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
) -> AttentionMaps:
    """Answer a prompt, and return the attention maps of the answer's tokens.

    Raises ModelError if the visual tokens form no grid, or if the language model's attention cannot
    be observed.
    """
    if not images:
        raise ModelError("there is no image to look at; give one with --image")
    encoded = model.prompt(prompt, images, raw=raw)
    _edge(model, encoded)
    ids = model.answer_ids([(prompt, images)], sampling or Sampling(), raw=raw)[0]
    return map_answer(model, encoded, model.prepare(images), ids)


def map_answer(
    model: LlavaModel, encoded: Encoded, pixels_IHW: Tensor | None, ids: Sequence[int]
) -> AttentionMaps:
    """Return the attention maps of an answer's tokens `ids` to an encoded prompt.

    Raises ModelError as `map_attention`.
    """
    edge = _edge(model, encoded)
    weights_AT = _attention(model, encoded, pixels_IHW, ids)
    pieces: list[str] = []
    for end in range(1, len(ids) + 1):
        # from the first: a token may be half a character
        text = str(model.language.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
        pieces.append(text[sum(map(len, pieces)) :])
    weights_AIGG = weights_AT[:, _first_rows(model, encoded, edge**2)].unflatten(2, (edge, edge))
    whole = encoded.arranged is not None
    return AttentionMaps(model.decode(ids), tuple(pieces), weights_AIGG, whole)


def _edge(model: LlavaModel, encoded: Encoded) -> int:
    """Return the edge of the grid with which each image's rows begin."""
    if encoded.arranged is None:
        return grid_edge(model)
    edges = {edge for image in encoded.arranged for edge in image.overview or (0,)}
    if len(edges) != 1 or 0 in edges:
        name = model.tiling.name if model.tiling is not None else ""
        raise ModelError(
            f"tiling `{name}` does not begin the rows of these images with equal squares that show "
            "all of each (those of a video never do), so no heat map can be drawn"
        )
    return edges.pop()


def _first_rows(model: LlavaModel, encoded: Encoded, count: int) -> Tensor:
    """Return the first rows of each image in the stream, `[I, count]`."""
    visual = np.flatnonzero(encoded.expand(model.visual_tokens).visual)
    lengths = [len(image.index_RK) for image in encoded.images(model.visual_tokens)]
    starts = np.cumsum([0, *lengths[:-1]])
    return torch.from_numpy(visual[starts[:, None] + np.arange(count)])


def grid_edge(model: LlavaModel) -> int:
    """Return the edge of an image's grid of visual tokens.

    Raises ModelError if they form no square that divides the patches into equal parts.
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
    model: LlavaModel, encoded: Encoded, pixels_IHW: Tensor | None, ids: Sequence[int]
) -> Tensor:
    """Return the attention `[A, T]` of the rows that predicted `ids`.

    The answer is read again in one pass, without its last token, which predicted nothing.
    """
    read = np.asarray(ids[:-1], dtype=np.int64)
    whole = replace(
        encoded,
        ids=np.concatenate([encoded.ids, read]),
        supervised=np.concatenate([encoded.supervised, np.zeros(len(read), np.bool_)]),
    )
    batch = pack([whole], [0], model.visual_tokens).to(model.device)
    length = batch.packing.starts[-1]
    # each row predicts the token behind it
    watch = _MeanOfHeads(torch.arange(length - len(ids), length, device=model.device))
    packing = replace(batch.packing, watch=watch)
    features = None if pixels_IHW is None else model.features(pixels_IHW)
    model.language.hidden(model.embed(batch, features), packing)
    layers, _, _ = model.language.cache_shape()
    if len(watch.weights) != layers:
        raise ModelError(
            f"language model `{model.language.name}` showed the attention of {len(watch.weights)} "
            f"of its {layers} layers: it must attend by llavakit.packed_attention"
        )
    weights_LAT = torch.stack(list(watch.weights.values()))
    return weights_LAT.mean(dim=0).cpu()
