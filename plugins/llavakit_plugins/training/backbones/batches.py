"""The batches of images and captions that a CLIP is trained on.

Shapes: B images in a batch, each with one of its captions, T tokens of the longest of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llavakit import ImageContext, VisionEncoder, read_pixels
from llavakit_plugins.datasets.image_files import inside
from llavakit_plugins.generation.scenes import FAMILY
from llavakit_plugins.training.backbones.distortions import varied_patches
from llavakit_plugins.training.backbones.loop import shuffled
from llavakit_plugins.training.backbones.options import ContrastiveOptions


class Batches:
    """Images are read when a step first shows them and stay in memory, for they are small."""

    def __init__(
        self,
        vision: VisionEncoder,
        patch: int,
        files: Sequence[Sequence[ImageContext]],
        folder: Path,
        captions: Sequence[Sequence[Sequence[int]]],
        padding: int,
        options: ContrastiveOptions,
        seed: int,
    ) -> None:
        self._vision, self._patch, self._folder = vision, patch, folder
        self._captions, self._padding, self._distortions = captions, padding, options.distortions
        self._contexts = [context for file in files for context in file]
        self._order = _Order(len(files[0]), len(captions), options, seed)
        edge, row = vision.image_size, vision.image_size // patch
        self._pixels = torch.empty(len(captions), 3, edge, edge)
        self._varied = torch.empty(len(captions), row, row, dtype=torch.bool)
        self._unread = set(range(len(captions)))

    def of(self, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels `[B, 3, H, W]`, float32, tokens `[B, T]`, and 1 where these are no padding.

        Pixels are changed on the device. Raises DataError if an image cannot be read.
        """
        index, draw = self._order.batch(step)
        chosen = [self._captions[i][int(draw.integers(len(self._captions[i])))] for i in index]
        rows = torch.full((len(index), max(map(len, chosen))), self._padding)
        mask = torch.zeros_like(rows)
        for number, ids in enumerate(chosen):
            rows[number, : len(ids)] = torch.tensor(ids)
            mask[number, : len(ids)] = 1
        self._read([number for number in index if number in self._unread])
        shown = self._pixels[index].to(device)
        if self._distortions is not None:
            self._distortions.change(shown, self._varied[index].to(device), self._patch, draw)
        return shown, rows.to(device), mask.to(device)

    def _read(self, numbers: list[int]) -> None:
        for number in numbers:
            context = self._contexts[number]
            where = f"context `{context.id}`"
            path = inside(self._folder, context.image, where)
            self._pixels[number] = read_pixels(self._vision, path, where)
        if numbers:
            self._varied[numbers] = varied_patches(self._pixels[numbers], self._patch)
            self._unread.difference_update(numbers)


class _Order:
    """Decides the images of a step: whole families, reshuffled whenever all have been used.

    The images of a family differ in their digits only, so they are hard negatives of each other.
    """

    def __init__(self, easy: int, total: int, options: ContrastiveOptions, seed: int) -> None:
        self._families = (easy // FAMILY, total // FAMILY)
        self._per = max(1, options.batch_size // FAMILY)
        self._first = int(options.first * options.steps) if easy < total else 0
        self._seed = seed

    def batch(self, step: int) -> tuple[list[int], np.random.Generator]:
        """Return the indices of a step's images, and the step's own random generator."""
        first = step < self._first
        families = self._families[0] if first else self._families[1]
        begin = (step if first else step - self._first) * self._per
        chosen = shuffled(range(begin, begin + self._per), families, self._seed, int(first))
        index = [family * FAMILY + member for family in chosen for member in range(FAMILY)]
        return index, np.random.default_rng([self._seed, 2, step])
