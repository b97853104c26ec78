"""One view of an image, as in LLaVA and LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from llavakit import Arrangement, Options, Shown, View
from llavakit_plugins.tilings.video import VideoOptions, WithVideos


class SingleOptions(Options):
    """Options of `single`."""

    video: VideoOptions | None = None
    """How videos are shown; unset: not at all."""


class Single(WithVideos):
    """Every image is one view, which the encoder's own preprocessing makes; its rows in order."""

    name = "single"
    Options = SingleOptions
    options: SingleOptions
    varies = False  # but where it shows videos

    def arrange_image(self, shown: Shown, view: View) -> Arrangement:
        return Arrangement(1, np.arange(view.tokens)[:, None])

    def cut_image(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        return (image,)
