"""Opens images and videos: what the core reads them with."""

from llavakit_plugins.media.images import MAX_PIXELS, MissingImage, image_size, open_image, refusal
from llavakit_plugins.media.videos import check_video, clip, frames

__all__ = [
    "MAX_PIXELS",
    "MissingImage",
    "check_video",
    "clip",
    "frames",
    "image_size",
    "open_image",
    "refusal",
]
