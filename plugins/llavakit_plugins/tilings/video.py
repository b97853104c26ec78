"""Videos as LLaVA's families show them: frames chosen, each pooled, and the rows between them.

Sources: LLaVA-NeXT's code (`mm_spatial_pool_mode`, `mm_newline_position`, `load_video`);
transformers' LlavaNextVideoForConditionalGeneration, which pools in front of the connector, and
LlavaOnevisionForConditionalGeneration, which interpolates behind it.

Shapes: F frames, H and W edges of a pooled frame, K embeddings that a row is made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from llavakit import Arrangement, Clip, Options, Shown, Tiling, View
from llavakit_plugins.tilings.geometry import grid_edge, interpolated

_SEPARATOR = -1  # stands for the learned row


class VideoOptions(Options):
    """Options of `video`; the defaults are LLaVA-OneVision's."""

    frames: int = Field(default=32, ge=1, le=4096)
    """The most frames of a video that are shown."""
    rate: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second, up to `frames` of them; unset: `frames`, however long the video is."""
    spread: Literal["ends", "parts"] = "ends"
    """"ends": from the first frame to the last, as LLaVA-NeXT's code; "parts": the first of as many
    equal parts, as transformers' video processors."""
    pool: Literal["none", "average", "max", "interpolate"] = "interpolate"
    """How a frame's grid of embeddings becomes a smaller one."""
    stride: int = Field(default=2, ge=1, le=64)
    """By how much the grid's edges are divided; "interpolate" rounds up, the others down."""
    pool_features: bool = False
    """Whether the encoder's features are pooled, and the connector reads fewer, as in
    LLaVA-NeXT-Video; else the connector's embeddings are."""
    newline: Literal["none", "end", "frame", "row"] = "end"
    """Where a learned row, `image_newline`, goes: nowhere, behind the video, behind each frame, or
    behind each line of each frame."""

    @model_validator(mode="after")
    def _largest_of_features(self) -> VideoOptions:
        if self.pool == "max" and not self.pool_features:
            raise ValueError('`pool = "max"` takes `pool_features = true`')
        return self


class WithVideos(Tiling):
    """A tiling of images whose option `video` says how it shows videos, if at all."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._video: VideoOptions | None = getattr(options, "video", None)
        if (video := self._video) is not None:
            self.varies = True
            self.separates |= video.newline != "none"
            self.pools = video.pool_features and video.pool != "none"

    def sample(self, clip: Clip) -> Sequence[int] | None:
        return None if self._video is None else sampled(clip, self._video)

    def arrange(self, shown: Shown, view: View) -> Arrangement:
        if self._video is not None and shown.frames:
            return _arranged(shown.frames, self._video, view.tokens)
        return self.arrange_image(shown, view)

    def cut(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        if shown.frames:
            return (image,)  # the encoder's own preprocessing makes a square of it
        return self.cut_image(image, shown, view)

    @abstractmethod
    def arrange_image(self, shown: Shown, view: View) -> Arrangement:
        """Return the rows of an image, as `arrange` does."""

    @abstractmethod
    def cut_image(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        """Return the views of an image, as `cut` does."""


def sampled(clip: Clip, video: VideoOptions) -> list[int]:
    """Return the frames that are shown, ascending; all where there are no more than `frames`.

    By rate, "ends" takes every n-th from the first one on, n being the video's own rate by the one
    asked for, rounded; "parts" takes as many as the duration and the rate give.
    """
    most, every = min(video.frames, clip.frames), video.spread == "ends"
    count = most
    if video.rate is not None and clip.rate > 0:
        if every:
            step = max(1, round(clip.rate / video.rate))
            if len(taken := range(0, clip.frames, step)) <= most:
                return list(taken)
        else:
            count = max(1, min(most, int(clip.frames / clip.rate * video.rate)))
    if every:
        return [int(at) for at in np.linspace(0, clip.frames - 1, count)]
    return [part * clip.frames // count for part in range(count)]


@lru_cache(maxsize=64)  # they depend on the number of frames alone: not one for each size
def _arranged(frames: int, video: VideoOptions, tokens: int) -> Arrangement:
    """Return the rows of a video, frame after frame."""
    index_HWK, weights_HWK = _pooled(grid_edge(View(0, tokens)), video)
    index_FHWK = index_HWK + tokens * np.arange(frames)[:, None, None, None]
    weights_FHWK = np.broadcast_to(weights_HWK, index_FHWK.shape)
    line, count = video.newline, index_FHWK.shape[3]
    if line == "row":
        index_FHWK, weights_FHWK = _ended(index_FHWK, 2), _ended(weights_FHWK, 2, 1)
    index_FRK = index_FHWK.reshape(frames, -1, count)
    weights_FRK = weights_FHWK.reshape(frames, -1, count)
    if line == "frame":
        index_FRK, weights_FRK = _ended(index_FRK, 1), _ended(weights_FRK, 1, 1)
    index_RK, weights_RK = index_FRK.reshape(-1, count), weights_FRK.reshape(-1, count)
    if line == "end":
        index_RK, weights_RK = _ended(index_RK, 0), _ended(weights_RK, 0, 1)
    weighs = count > 1 and video.pool != "max"
    pools = video.pool_features and video.pool != "none"
    return Arrangement(
        frames, index_RK, weights_RK.astype(np.float32) if weighs else None, pools=pools
    )


def _pooled(edge: int, video: VideoOptions) -> tuple[Any, Any]:
    """Return what the rows of the first frame are made of, `[H, W, K]`, and the weights."""
    index_HW, stride = np.arange(edge**2).reshape(edge, edge), video.stride
    if video.pool == "interpolate" and stride > 1:
        smaller = -(-edge // stride)
        return interpolated(index_HW, smaller, smaller)
    if video.pool in ("average", "max") and stride > 1:
        # as torch's pooling does: what a last window has no room for is left out
        smaller = max(1, edge // stride)
        stride = min(stride, edge)
        kept = index_HW[: smaller * stride, : smaller * stride]
        windows = kept.reshape(smaller, stride, smaller, stride).transpose(0, 2, 1, 3)
        index_HWK = windows.reshape(smaller, smaller, -1)
        return index_HWK, np.full(index_HWK.shape, 1 / index_HWK.shape[2])
    return index_HW[..., None], np.ones((edge, edge, 1))


def _ended(array: Any, axis: int, value: int = _SEPARATOR) -> Any:
    """Return an array with one more entry along an axis."""
    room = [(0, int(number == axis)) for number in range(array.ndim)]
    return np.pad(array, room, constant_values=value)
