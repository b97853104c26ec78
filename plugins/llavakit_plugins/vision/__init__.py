"""Vision encoders."""

from __future__ import annotations

from llavakit import VisionEncoder, hookimpl


@hookimpl
def llava_vision_encoders() -> list[type[VisionEncoder]]:
    from llavakit_plugins.vision.clip import Clip
    from llavakit_plugins.vision.siglip import Siglip
    from llavakit_plugins.vision.timm import Timm

    return [Clip, Siglip, Timm]
