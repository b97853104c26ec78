"""SigLIP with Qwen 2 against transformers' LlavaForConditionalGeneration of the same parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.core.peer import Bare
from tests.plugins.families import config_of, qwen_tokenizer
from torch import Tensor

from llavakit import LlavaModel
from llavakit.contracts.model import Sampling
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.vision.siglip import Siglip, SiglipOptions

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
LANGUAGE = config_of("qwen2")
IMAGE_TOKEN = 300
PROMPTS = [
    ("Look: <image> What is it?", 1),
    ("<image>\nand <image>\ndiffer how?", 2),
    ("No image, only a question.", 0),
    ("<image>", 1),
]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, LlavaModel]:
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = {key: value for key, value in LANGUAGE.items() if key != "model_type"}
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**VISION),
            text_config=Qwen2Config(**text),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="full",  # no class token to drop
            tie_word_embeddings=True,
        )
        theirs = LlavaForConditionalGeneration(config).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    vision = Siglip(SiglipOptions(config=VISION))
    tower = theirs.model.vision_tower
    vision.inner.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
    language = CausalLM(CausalLMOptions(config=LANGUAGE))
    language.model.model.load_state_dict(theirs.model.language_model.state_dict())
    assert torch.equal(language.head.weight, theirs.lm_head.weight)  # tied
    language.tokenizer = qwen_tokenizer()
    connector = Mlp(MlpOptions(), vision_width=vision.width, language_width=language.width)
    projector = theirs.model.multi_modal_projector
    connector.layers[0].load_state_dict(projector.linear_1.state_dict())
    connector.layers[2].load_state_dict(projector.linear_2.state_dict())
    return theirs, LlavaModel(vision, connector, language, Bare(), choices={}).eval()


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(count)
    return [
        Image.fromarray(draw.integers(0, 255, (40 + 3 * n, 36, 3), dtype=np.uint8))
        for n in range(count)
    ]


def their_inputs(ours: LlavaModel, prompt: str, pixels: Tensor | None) -> dict[str, Tensor]:
    ids: list[int] = []
    for number, text in enumerate(prompt.split("<image>")):
        ids += [IMAGE_TOKEN] * ours.visual_tokens if number else []
        ids += ours.language.tokenizer(text)["input_ids"] if text else []
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    return inputs if pixels is None else inputs | {"pixel_values": pixels}


@pytest.mark.parametrize(("prompt", "images"), PROMPTS)
def test_logits_and_greedy_tokens_equal(
    pair: tuple[Any, LlavaModel], prompt: str, images: int
) -> None:
    theirs, ours = pair
    sources = pictures(images)
    inputs = their_inputs(ours, prompt, ours.prepare(sources))
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    found = ours.logits(prompt, sources, raw=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    tokens = theirs.generate(
        **inputs, max_new_tokens=20, do_sample=False, pad_token_id=0,
        eos_token_id=ours.language.tokenizer.eos_token_id,
    )[0, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
    assert ours.generate_ids(prompt, sources, max_new_tokens=20, raw=True) == tokens


def test_a_batch_equals_one_by_one(pair: tuple[Any, LlavaModel]) -> None:
    _, ours = pair
    prompts = [(prompt, pictures(images)) for prompt, images in PROMPTS]
    batch = ours.answer_ids(prompts, Sampling(16), raw=True)
    assert batch == [ours.answer_ids([one], Sampling(16), raw=True)[0] for one in prompts]
