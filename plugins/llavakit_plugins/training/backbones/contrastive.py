"""Trains a small CLIP contrastively (arXiv 2103.00020, section 2.3) and keeps its vision half.

Shapes: B images in a batch, and as many captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import ImageContext, ModelError, Run, VisionEncoder
from llavakit_plugins.huggingface.products import choose_products
from llavakit_plugins.training.backbones.batches import Batches
from llavakit_plugins.training.backbones.loop import Training, updates_of
from llavakit_plugins.training.backbones.options import ContrastiveOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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

    Weights are drawn here, images read in the steps. Raises ModelError if `vision` is not a CLIP.
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
    # each text once and all at once: a small world has few, and a call for each takes ten times as
    # long
    texts = list({caption: None for context in contexts for caption in context.captions})
    ids_of = dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    end_of_text = tokenizer.eos_token_id  # which is looked up each time
    captions = [[[*ids_of[text], end_of_text] for text in context.captions] for context in contexts]
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
    updates = updates_of(clip, options, run)
    batches = Batches(
        vision, target.config.patch_size, files, images,
        captions, tokenizer.pad_token_id, options, run.seed,
    )  # fmt: skip

    def loss_of(step: int) -> Tensor:
        shown, rows, mask = batches.of(step, device)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, _MAX_SCALE)
        logits_BB = clip(input_ids=rows, attention_mask=mask, pixel_values=shown).logits_per_image
        truth = torch.arange(len(rows), device=device)
        loss: Tensor = (F.cross_entropy(logits_BB, truth) + F.cross_entropy(logits_BB.T, truth)) / 2
        return loss

    def end() -> None:
        # older versions of transformers wrap the transformer once more, on either side
        inner = getattr(target, "vision_model", target)
        trained = getattr(clip.vision_model, "vision_model", clip.vision_model)
        inner.load_state_dict(trained.state_dict())

    return Training("contrastive", updates, options.steps, loss_of, end)
