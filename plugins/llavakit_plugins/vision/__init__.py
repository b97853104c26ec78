"""Vision encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit import hookimpl

if TYPE_CHECKING:
    from llavakit import VisionEncoder


@hookimpl
def llava_vision_encoders() -> list[type[VisionEncoder]]:
    from llavakit_plugins.vision.clip import Clip
    from llavakit_plugins.vision.siglip import Siglip
    from llavakit_plugins.vision.timm import Timm

    return [Clip, Siglip, Timm]
