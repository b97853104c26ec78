"""Opens images and videos: what the core reads them with."""

from llavakit_plugins.media.images import image_size, open_image
from llavakit_plugins.media.videos import clip, frames

__all__ = ["clip", "frames", "image_size", "open_image"]
