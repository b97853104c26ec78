"""The grid of patches that SigLIP 2's NaFlex models make of an image (arXiv 2502.14786)."""

from __future__ import annotations

from math import ceil

_CLOSE = 1e-5  # where transformers' search for the scale ends


def patch_grid(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """Return rows and columns: the largest grid in the image's proportions of at most `most`.

    The search is that of transformers' Siglip2ImageProcessor, step by step.
    """

    def edge(scale: float, pixels: int) -> int:
        return max(1, ceil(pixels * scale / patch))

    low, high = _CLOSE / 10, 100.0
    while high - low >= _CLOSE:
        scale = (low + high) / 2
        fits = edge(scale, height) * edge(scale, width) <= most
        low, high = (scale, high) if fits else (low, scale)
    return edge(low, height), edge(low, width)
