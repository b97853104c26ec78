"""The same LLaVA twice: transformers' LlavaForConditionalGeneration, and ours with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from torch import Tensor

from llavakit import LlavaModel, PromptTemplate, Segment, Turn
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.huggingface.products import Products
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.tilings.anyres import Anyres
from llavakit_plugins.vision.clip import Clip
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

IMAGE_TOKEN = 63


class Bare(PromptTemplate):
    """The turns' text, one behind the other."""

    name = "bare"

    def segments(self, turns: Sequence[Turn], tokenizer: Any) -> list[Segment]:
        return [Segment(turn.text, supervised=turn.role == "gpt") for turn in turns]


def make_pair(
    vision: dict[str, Any] = VISION,
    language: dict[str, Any] = LANGUAGE,
    seed: int = 0,
    tiling: Anyres | None = None,
    encoder: type[TransformersEncoder] = Clip,
    products: Products = "torch",
) -> tuple[Any, LlavaModel]:
    """Return (theirs, ours), float32 on the CPU, sharing every weight's values.

    With a tiling theirs is LlavaNextForConditionalGeneration. `products` says how ours multiplies.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    kind: Any = LlavaConfig if tiling is None else partial(LlavaNextConfig, **pinpoints(tiling))
    network: Any = LlavaForConditionalGeneration
    if tiling is not None:
        network = LlavaNextForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = kind(
            vision_config=cast(Any, encoder.architecture().config_class)(**vision),
            text_config=LlamaConfig(**language),
            tie_word_embeddings=language.get("tie_word_embeddings", False),
            image_token_index=IMAGE_TOKEN,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default" if encoder.prefix_tokens else "full",
        )
        theirs = network(config).eval()
        for parameter in theirs.parameters():  # zero biases would hide a forgotten one
            parameter.data += 0.02 * torch.randn_like(parameter)
    ours_vision = encoder(encoder.Options(config=vision, products=products))
    inner = getattr(ours_vision.model, "vision_model", ours_vision.model)
    tower = theirs.model.vision_tower
    inner.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
    llama = LlamaForCausalLM(LlamaConfig(**language))
    llama.model.load_state_dict(theirs.model.language_model.state_dict())
    llama.lm_head.load_state_dict(theirs.lm_head.state_dict())
    ours_language = Vicuna(VicunaOptions(config=language, products=products), llama)
    ours_language.tokenizer = make_tokenizer()
    widths = {"vision_width": ours_vision.width, "language_width": ours_language.width}
    connector = Mlp(MlpOptions(products=products), **widths)
    projector = theirs.model.multi_modal_projector
    connector.layers[0].load_state_dict(projector.linear_1.state_dict())
    connector.layers[2].load_state_dict(projector.linear_2.state_dict())
    ours = LlavaModel(ours_vision, connector, ours_language, Bare(), choices={}, tiling=tiling)
    if ours.image_newline is not None:
        ours.image_newline.data.copy_(theirs.model.image_newline)
    return theirs, ours.eval()


def pinpoints(tiling: Anyres, edge: int = VISION["image_size"]) -> dict[str, Any]:
    """Return what transformers calls a tiling's grids."""
    return {"image_grid_pinpoints": [[r * edge, c * edge] for r, c in tiling.options.grids]}


def their_inputs(ours: LlavaModel, prompt: str, pixels: Tensor | None) -> dict[str, Tensor]:
    """Return what their model reads for a raw prompt, image tokens repeated."""
    ids: list[int] = []
    for number, text in enumerate(prompt.split("<image>")):
        if number:
            ids += [IMAGE_TOKEN] * ours.visual_tokens
        if text or not number:
            ids += ours.language.tokenizer(text, add_special_tokens=number == 0)["input_ids"]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    return inputs if pixels is None else inputs | {"pixel_values": pixels}
