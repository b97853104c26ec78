"""How an image becomes the square that a vision transformer reads: the choices. Without torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llavakit_plugins.media.thin_images import RGB as RGB

Aspect = Literal["crop", "pad", "squash"]
Backend = Literal["pil", "torchvision"]
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

TORCH_FILTERS = ("bilinear", "bicubic")  # those that PyTorch's kernel for bytes has

MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each colour over CLIP's training images; values are 0..1."""
STD: RGB = (0.26862954, 0.26130258, 0.27577711)


class Square(NamedTuple):
    """How an image becomes a square of `size` pixels."""

    size: int
    aspect: Aspect
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bicubic"
    fast: bool = False
    """Whether large images are first shrunk by averaging whole blocks: faster, and not exact."""
    backend: Backend = "pil"
    """Whose pixels they are, to the last bit: transformers' processors have two backends."""
