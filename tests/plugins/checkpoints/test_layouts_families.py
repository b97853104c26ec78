"""transformers' LLaVA layout with language models of other families, against its own class."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import VISION, make_tokenizer
from tests.plugins.families import config_of
from tests.plugins.made_checkpoints import (
    CHAT,
    PROMPTS,
    SIGLIP,
    ask_hf,
    pictures,
    read_processor,
    shaken,
)

import llavakit
from llavakit import ModelError
from llavakit.model.folder import save_model
from llavakit_plugins.checkpoints.hf import Hf


def make(folder: Path, family: str, vision: Any = None, **config: Any) -> Any:
    """Save a LlavaForConditionalGeneration of a family with its processor, and return it."""
    from transformers import (
        AutoConfig,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LlavaConfig(
            vision_config=vision or CLIPVisionConfig(**VISION),
            text_config=AutoConfig.for_model(**config_of(family)),
            image_token_index=22, **config,
        )  # fmt: skip
        model = shaken(LlavaForConditionalGeneration(settings))
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return model


def away(theirs: Any, folder: Path, ours: Any) -> float:
    prompt, count = PROMPTS[0]
    images = pictures(count)
    with torch.no_grad():
        expected = theirs(**ask_hf(read_processor(folder), prompt, images)).logits[0]
    return float((ours.logits(prompt, images, raw=True) - expected).abs().max())


SCALED = {
    "gemma2": "final_logit_softcapping", "granite": "logits_scaling", "cohere2": "logit_scale",
}  # fmt: skip


@pytest.mark.parametrize("family", [*SCALED, "gpt_neox", "phi", "mistral"])
def test_a_family_has_the_logits_that_transformers_llava_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    theirs = make(tmp_path / "hf", family)
    theirs.set_attn_implementation("eager")  # transformers 5.17 leaves soft caps out of the other
    ours = llavakit.load(tmp_path / "hf", device="cpu")
    assert away(theirs, tmp_path / "hf", ours) < 1e-5
    assert ("plain_logits = false" in caplog.text) == (family in SCALED)
    assert SCALED.get(family, "") in caplog.text
    save_model(ours, tmp_path / "native")
    again = llavakit.load(tmp_path / "native", device="cpu")
    assert away(theirs, tmp_path / "hf", again) < 1e-5
    if family in SCALED:
        own = llavakit.load(
            tmp_path / "native", device="cpu", options={"language": {"plain_logits": False}}
        )
        assert away(theirs, tmp_path / "hf", own) > 1e-2
        with pytest.raises(ModelError, match=rf"has {SCALED[family]}, for which the layout `hf`"):
            Hf().export(own, tmp_path / "out")
    table = tomllib.loads((tmp_path / "native" / "model.toml").read_text())
    assert table["language"].get("plain_logits", False) == (family in SCALED)
    assert Hf().export(again, tmp_path / "out")["largest_logit_difference"] < 1e-5
    assert away(theirs, tmp_path / "hf", llavakit.load(tmp_path / "out", device="cpu")) < 1e-5


def test_the_loss_is_that_of_the_logits(tmp_path: Path) -> None:
    make(tmp_path / "hf", "gemma2")
    language = llavakit.load(tmp_path / "hf", device="cpu").language
    hidden, targets = torch.randn(5, 32), torch.arange(5)
    expected = torch.nn.functional.cross_entropy(
        hidden @ language.head.weight.T, targets, reduction="sum"
    )
    torch.testing.assert_close(language.loss(hidden, targets), expected, atol=1e-4, rtol=1e-4)


def test_a_vocabulary_without_room_is_widened_whatever_its_table_is_called(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    make(tmp_path / "hf", "gpt_neox")
    ours = llavakit.load(tmp_path / "hf", device="cpu")
    rows: int = ours.language.head.out_features
    ours.language.tokenizer = make_tokenizer()
    ours.language.tokenizer.add_tokens([f"w{n}" for n in range(rows - len(make_tokenizer()))])
    Hf().export(ours, tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokens = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    table: Any = theirs.get_input_embeddings().weight
    assert rows < tokens <= len(table)


def test_naflex_towers_are_refused_for_what_they_are(tmp_path: Path) -> None:
    from transformers import Siglip2VisionConfig

    vision = Siglip2VisionConfig(**{**SIGLIP, "num_patches": 16})
    make(tmp_path / "hf", "mistral", vision, vision_feature_select_strategy="full")
    with pytest.raises(ModelError, match=r"NaFlex, which reads images in their own proportions"):
        llavakit.load(tmp_path / "hf", device="cpu")
