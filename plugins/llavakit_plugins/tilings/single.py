"""One view of an image, as in LLaVA and LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from llavakit import Arrangement, Shown, Tiling, View


class Single(Tiling):
    """Every image is one view, which the encoder's own preprocessing makes; its rows in order."""

    name = "single"
    varies = False

    def arrange(self, shown: Shown, view: View) -> Arrangement:
        return Arrangement(1, np.arange(view.tokens)[:, None])

    def cut(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        return (image,)
