"""One view that keeps an image's proportions, as encoders with NaFlex make it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np
from PIL import Image

from llavakit import Arrangement, Shown, Tiling, View
from llavakit_plugins.huggingface.naflex import patch_grid


class Native(Tiling):
    """The rows of an image are the patches that it fills; those behind them are padding.

    For encoders that say so themselves (`siglip2-naflex`), with connectors that keep every patch.
    """

    name = "native"

    def arrange(self, shown: Shown, view: View) -> Arrangement:
        patch = view.size // isqrt(view.tokens)
        rows, columns = patch_grid(shown.width, shown.height, patch, view.tokens)
        return Arrangement(1, np.arange(rows * columns)[:, None], overview=(rows, columns))

    def cut(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        return (image,)
