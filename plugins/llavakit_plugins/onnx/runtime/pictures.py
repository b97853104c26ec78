"""From an RGB image to the pixels that the vision encoder's graph takes, in numpy and Pillow."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

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
        if self.aspect == "pad":
            image = pad_to_square(image, self.mean)
        if self.aspect == "crop":
            image = without_ends(image)
        if self.aspect == "squash":
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), how)
        elif min(image.size) != self.resized:
            # cut and not rounded, as in transformers and torchvision:
            # one pixel more would shift the crop
            longest = int(self.resized * max(image.size) / min(image.size))
            wide = image.width >= image.height
            image = image.resize((longest, self.resized) if wide else (self.resized, longest), how)
        top, left = (image.height - self.size) // 2, (image.width - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        # in float64 first, as transformers have it
        pixels_HWC = (np.asarray(image) * (1 / 255)).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        normal_HWC: FloatArray = (pixels_HWC - mean) / std
        return np.ascontiguousarray(normal_HWC.transpose(2, 0, 1))
