"""The built-in vision encoders, by name."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_vision_encoders() -> Mapping[str, str]:
    return {
        "clip": "llavakit_plugins.vision.clip:Clip",
        "siglip": "llavakit_plugins.vision.siglip:Siglip",
        "siglip2-naflex": "llavakit_plugins.vision.siglip2:Siglip2Naflex",
        "timm": "llavakit_plugins.vision.timm:Timm",
    }
