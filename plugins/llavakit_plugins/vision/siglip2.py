"""SigLIP 2 with NaFlex: images keep their proportions (arXiv 2502.14786, section 2.4.2).

A view is what `prepare` returns for an image of any shape: its patches row by row, laid out in a
square with room for `num_patches`, and a fourth channel that begins with their rows and columns.
Shapes: B images, P places for patches, D width.
"""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.naflex import patch_grid
from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.resizing import resize
from llavakit_plugins.vision.preprocessing import normalise
from llavakit_plugins.vision.square import RGB, Interpolation
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Siglip2Naflex(TransformersEncoder):
    """transformers' Siglip2VisionModel. Its tiling is `native`: padding takes no rows."""

    name = "siglip2-naflex"
    default_tiling = "native"
    channels = 4
    mean: ClassVar[RGB] = (0.5, 0.5, 0.5)
    std: ClassVar[RGB] = (0.5, 0.5, 0.5)
    interpolation: ClassVar[Interpolation] = "bilinear"

    @classmethod
    def architecture(cls) -> type[PreTrainedModel]:
        from transformers import Siglip2VisionModel

        return Siglip2VisionModel

    def edges(self, config: Any) -> tuple[int, int]:
        return isqrt(config.num_patches) * config.patch_size, config.patch_size

    def prepare(self, image: Image.Image) -> Tensor:
        patch, edge = self.patch_size, self.image_size // self.patch_size
        rows, columns = patch_grid(*image.size, patch, edge**2)
        how = Image.Resampling[self.square.interpolation.upper()]
        resized = resize(image, (columns * patch, rows * patch), how)
        pixels_3HW = normalise(pixels_of(resized), self.square.mean, self.square.std)
        grid = pixels_3HW.unflatten(2, (columns, patch)).unflatten(1, (rows, patch))
        own = grid.permute(1, 3, 0, 2, 4).flatten(0, 1)  # [patches, 3, patch, patch]
        padded = torch.zeros(edge**2, 3, patch, patch)
        padded[: len(own)] = own
        square = (
            padded.unflatten(0, (edge, edge)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        )
        sizes = torch.zeros(1, self.image_size, self.image_size)
        sizes[0, 0, :2] = torch.tensor([rows, columns])
        return torch.cat([square, sizes])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        patch, edge = self.patch_size, self.image_size // self.patch_size
        grid = pixels_BCHW[:, :3].unflatten(3, (edge, patch)).unflatten(2, (edge, patch))
        patches_BPF = grid.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
        embeddings_BPD: Tensor = self.inner.embeddings(patches_BPF, _sizes(pixels_BCHW))
        return embeddings_BPD

    def masks(self, pixels_BCHW: Tensor) -> dict[str, Tensor | None]:
        """Return the mask by which no patch sees padding."""
        places_P = torch.arange(self.tokens(self.image_size), device=pixels_BCHW.device)
        real_BP = places_P < _sizes(pixels_BCHW).prod(dim=1, keepdim=True)
        return {"attention_mask": real_BP[:, None, None]}

    def save(self, folder: Path) -> None:
        with quietly():
            self.model.save_pretrained(folder)
        table = {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": self.patch_size,
            "max_num_patches": self.tokens(self.image_size),
            "resample": int(Image.Resampling[self.square.interpolation.upper()]),
            "image_mean": list(self.square.mean),
            "image_std": list(self.square.std),
        }
        text = json.dumps(table, indent=2)
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _sizes(pixels_BCHW: Tensor) -> Tensor:
    """Return rows and columns of each image's patches, `[B, 2]`."""
    return pixels_BCHW[:, 3, 0, :2].round().long()
