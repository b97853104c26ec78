"""From an RGB image to the pixels that the vision encoder's graph takes, in numpy and Pillow."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from llavakit_plugins.media.resizing import middle_pixels, padded_pixels
from llavakit_plugins.media.thin_images import pad_to_square, without_ends

FloatArray = npt.NDArray[np.float32]
Resample = Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
RESAMPLES = {name: Image.Resampling[name.upper()] for name in get_args(Resample)}


Edge = Annotated[int, Field(gt=0, le=1 << 13)]
Level = Annotated[float, Field(ge=-1e4, le=1e4)]
Spread = Annotated[float, Field(ge=1e-6, le=1e4)]


class Preparation(BaseModel):
    """How an image becomes a square of `size` pixels."""

    model_config = ConfigDict(frozen=True)

    size: Edge
    aspect: Literal["crop", "pad", "squash"]
    """Cut the middle square, pad to a square with the mean colour, or squash to a square."""
    resample: Resample
    resized: Edge
    """The edge that the shortest side gets before the crop; `size` but for crops within."""
    mean: tuple[Level, Level, Level]
    std: tuple[Spread, Spread, Spread]

    def prepare(self, image: Image.Image) -> FloatArray:
        """Return normalised pixels `[3, size, size]` of an RGB image."""
        how = RESAMPLES[self.resample]
        if self.aspect == "pad" and self.resized == self.size:
            return self._normalised(padded_pixels(image, self.mean, self.size, how))
        if self.aspect == "pad":
            image = pad_to_square(image, self.mean)
        if self.aspect == "crop":
            image = without_ends(image)
        size = image.size
        if self.aspect == "squash":
            size = self.size, self.size
        elif min(size) != self.resized:
            # cut and not rounded, as in transformers and torchvision:
            # one pixel more would shift the crop
            longest = int(self.resized * max(size) / min(size))
            wide = size[0] >= size[1]
            size = (longest, self.resized) if wide else (self.resized, longest)
        return self._normalised(middle_pixels(image, size, self.size, how))

    def _normalised(self, pixels_HWC: npt.NDArray[np.uint8]) -> FloatArray:
        """Return the pixels, each looked up by its byte, which is faster than to compute them."""
        levels_3L = _levels(self.mean, self.std)
        found_3HW: FloatArray = np.empty((3, *pixels_HWC.shape[:2]), np.float32)
        for colour in range(3):  # no byte is out of range, which `clip` need not check
            np.take(levels_3L[colour], pixels_HWC[..., colour], out=found_3HW[colour], mode="clip")
        return found_3HW


@lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> FloatArray:
    """Return the normalised values of each colour's 256 levels, `[3, 256]`."""
    # in float64 first, as transformers have it
    levels_L = (np.arange(256) * (1 / 255)).astype(np.float32)
    found_L3 = (levels_L[:, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(found_L3.T)
