"""From an RGB image to the pixels that the vision encoder's graph takes, in numpy and Pillow."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

FloatArray = npt.NDArray[np.float32]
Resample = Literal["bicubic", "bilinear", "lanczos"]
RESAMPLES = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


class Preparation(BaseModel):
    """How an image becomes a square of `size` pixels."""

    model_config = ConfigDict(frozen=True)

    size: int
    aspect: Literal["crop", "pad", "stretch"]
    """Cut the middle square, pad to a square with the mean colour, or stretch to it."""
    resample: Resample
    resized: int
    """The edge that the shortest side gets before the crop; `size` but for crops within."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, image: Image.Image) -> FloatArray:
        """Return normalised pixels `[3, size, size]` of an RGB image."""
        how = RESAMPLES[self.resample]
        if self.aspect == "pad" and image.width != image.height:
            edge = max(image.size)
            colour = tuple(int(255 * value) for value in self.mean)
            canvas = Image.new("RGB", (edge, edge), colour)
            canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
            image = canvas
        if self.aspect == "stretch":
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), how)
        elif min(image.size) != self.resized:
            longest = int(max(image.size) * (self.resized / min(image.size)))
            wide = image.width >= image.height
            image = image.resize((longest, self.resized) if wide else (self.resized, longest), how)
        top, left = (image.height - self.size) // 2, (image.width - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels_HWC = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((pixels_HWC - mean) / std).transpose(2, 0, 1).copy()
