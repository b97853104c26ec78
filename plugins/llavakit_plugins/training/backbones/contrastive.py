"""Trains a small CLIP contrastively (arXiv 2103.00020, section 2.3) and keeps its vision half.

Shapes: B images in a batch, and as many captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import ImageContext, ModelError, Run, VisionEncoder, read_pixels
from llavakit_plugins.datasets.image_files import inside
from llavakit_plugins.generation.scenes import FAMILY
from llavakit_plugins.huggingface.products import choose_products
from llavakit_plugins.training.backbones.distortions import varied_patches
from llavakit_plugins.training.backbones.loop import Training, shuffled, updates_of
from llavakit_plugins.training.backbones.options import ContrastiveOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 512  # images
_MAX_SCALE = math.log(100)  # CLIP's limit on the logit scale, "to prevent training instability"


def clip_training(
    vision: VisionEncoder,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[Sequence[ImageContext]],
    images: Path,
    options: ContrastiveOptions,
    run: Run,
) -> Training:
    """Return the training of a new CLIP on images and captions; in the end `vision` is its half.

    Images are read and weights are drawn here. Raises ModelError if `vision` is not a CLIP,
    DataError if an image cannot be read.
    """
    from transformers import CLIPConfig, CLIPModel

    target = getattr(vision, "model", None)
    if type(target).__name__ != "CLIPVisionModel":
        raise ModelError(
            f"`backbones` trains a CLIP, not `{vision.name}`; use `clip` as vision encoder"
        )
    assert target is not None
    device = target.device
    contexts = [context for file in files for context in file]
    texts = [caption for context in contexts for caption in context.captions]
    found = iter(tokenizer(texts)["input_ids"])  # at once: a call for each takes ten times as long
    captions = [
        [[*next(found), tokenizer.eos_token_id] for _ in context.captions] for context in contexts
    ]
    text = {
        **options.text,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(len(ids) for all_ids in captions for ids in all_ids),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": target.config.projection_dim,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=target.config.to_dict(),
        projection_dim=target.config.projection_dim,
        logit_scale_init_value=math.log(1 / 0.07),  # CLIP's initial temperature of 0.07
    )
    torch.manual_seed(run.seed)
    clip = CLIPModel(config).train().to(device)
    choose_products(clip, getattr(vision, "products", "torch"))
    for module in clip.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=options.loudness)
    # all images are read once and stay in memory: they are small, and every step needs some
    pixels = _read(contexts, images, vision, run)
    edge = target.config.patch_size
    varied = torch.cat([varied_patches(images, edge) for images in pixels.split(_AT_ONCE)])
    updates = updates_of(clip, options, run)
    order = _Order(len(files[0]), len(contexts), options, run.seed)

    def loss_of(step: int) -> Tensor:
        index, draw = order.batch(step)
        chosen = [captions[i][int(draw.integers(len(captions[i])))] for i in index]
        longest = max(map(len, chosen))
        rows = torch.full((len(index), longest), tokenizer.pad_token_id)
        for number, ids in enumerate(chosen):
            rows[number, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(longest) < torch.tensor([len(ids) for ids in chosen])[:, None]).long()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, _MAX_SCALE)
        shown = pixels[index].to(device)
        if options.distortions is not None:
            options.distortions.change(shown, varied[index].to(device), edge, draw)
        logits_BB = clip(
            input_ids=rows.to(device),
            attention_mask=mask.to(device),
            pixel_values=shown,
        ).logits_per_image
        truth = torch.arange(len(index), device=device)
        loss: Tensor = (F.cross_entropy(logits_BB, truth) + F.cross_entropy(logits_BB.T, truth)) / 2
        return loss

    def end() -> None:
        # older versions of transformers wrap the transformer once more, on either side
        inner = getattr(target, "vision_model", target)
        trained = getattr(clip.vision_model, "vision_model", clip.vision_model)
        inner.load_state_dict(trained.state_dict())

    return Training("contrastive", updates, options.steps, loss_of, end)


def _read(
    contexts: Sequence[ImageContext], folder: Path, vision: VisionEncoder, run: Run
) -> Tensor:
    """Return the pixels of every image, `[number of contexts, 3, H, W]`, float32, on the CPU."""
    pixels = torch.empty(len(contexts), 3, vision.image_size, vision.image_size)
    for number, context in enumerate(contexts):
        where = f"context `{context.id}`"
        pixels[number] = read_pixels(vision, inside(folder, context.image, where), where)
        if number % _AT_ONCE == _AT_ONCE - 1:
            run.progress(number + 1, len(contexts), "reading images")
    return pixels


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
