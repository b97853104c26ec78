"""Random affine changes of patches, so that a small world of images is not learned by heart.

Shapes: B images of H x W pixels; N patches of E x E pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor


class Distortions(BaseModel):
    """The largest changes of a patch; each gets its own, drawn evenly."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rotate: float = Field(default=0.0, ge=0, le=180)
    """Degrees, either way."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Natural logarithm of a change in width, and of another in height: 0.1 is about 10 %."""
    shear: float = Field(default=0.0, ge=0, lt=1)
    """Pixels aside for each pixel of height."""
    shift: float = Field(default=0.0, ge=0)
    """Pixels, in width and in height."""

    def change(
        self, pixels_B3HW: Tensor, varied_BRC: Tensor, edge: int, draw: np.random.Generator
    ) -> None:
        """Change patches of `edge` pixels of the images, in place, each within its own square.

        `varied_BRC` says which: see `varied_patches`. A patch keeps its place, so whatever a
        caption says of places stays true. What lies outside of a patch is the pixel at its edge.
        """
        import torch  # not before: plans only check the limits
        from torch.nn import functional as F

        views_BRC3EE = _patches(pixels_B3HW, edge)
        patches_N3EE = views_BRC3EE[varied_BRC]
        maps_N23 = torch.from_numpy(self._draw(len(patches_N3EE), edge, draw)).to(patches_N3EE)
        grid_NEE2 = F.affine_grid(maps_N23, list(patches_N3EE.shape), align_corners=False)
        views_BRC3EE[varied_BRC] = F.grid_sample(
            patches_N3EE, grid_NEE2, mode="bilinear", padding_mode="border", align_corners=False
        )

    def _draw(self, count: int, edge: int, draw: np.random.Generator) -> npt.NDArray[np.float64]:
        """Return for each patch where its pixels come from, `[count, 2, 3]`.

        Positions run from -1 to 1 there, so that a pixel is 2 / E.
        """
        angle = np.deg2rad(draw.uniform(-self.rotate, self.rotate, count))
        wide, high = np.exp(draw.uniform(-self.scale, self.scale, (2, count)))
        slant = draw.uniform(-self.shear, self.shear, count)
        right, down = draw.uniform(-self.shift, self.shift, (2, count)) * 2 / edge
        cos, sin = np.cos(angle), np.sin(angle)
        first = (cos * wide, cos * slant - sin * high, right)
        second = (sin * wide, sin * slant + cos * high, down)
        return np.stack((*first, *second), axis=1).reshape(count, 2, 3)


def varied_patches(pixels_B3HW: Tensor, edge: int) -> Tensor:
    """Return which patches of images have more than one colour, `[B, rows, columns]`."""
    views_BRC3EE = _patches(pixels_B3HW, edge)
    return (views_BRC3EE != views_BRC3EE[..., :1, :1]).flatten(3).any(-1)


def _patches(pixels_B3HW: Tensor, edge: int) -> Tensor:
    """Return a view of the patches: what is written to it is written to the images."""
    views_B3RCEE = pixels_B3HW.unfold(2, edge, edge).unfold(3, edge, edge)
    return views_B3RCEE.permute(0, 2, 3, 1, 4, 5)
