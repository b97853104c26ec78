"""CLIP and SigLIP equal transformers' own models, from whatever folder they come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavakit import ModelError, VisionEncoder
from llavakit.engine.plan import count_parameters
from llavakit.testing import VisionEncoderContract, make_picture
from llavakit_plugins.vision.clip import Clip, ClipOptions
from llavakit_plugins.vision.siglip import Siglip, SiglipOptions
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 30, "patch_size": 7,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


class Family:
    """A family with transformers' classes for it."""

    def __init__(self, encoder: Any, prefix: int, vision: Any, vision_config: Any) -> None:
        self.encoder, self.prefix = encoder, prefix
        self.vision, self.vision_config = vision, vision_config

    def make(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        model = self.vision(self.vision_config(**(SHAPE | changes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # layer norms are no identity
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def open(self, folder: Path, **options: Any) -> Any:
        return self.encoder.create(self.encoder.Options(source=str(folder), **options)).eval()


CLIP = Family(Clip, 1, CLIPVisionModel, CLIPVisionConfig)
SIGLIP = Family(Siglip, 0, SiglipVisionModel, SiglipVisionConfig)
families = pytest.mark.parametrize("family", [CLIP, SIGLIP], ids=["clip", "siglip"])


class TestSiglip(VisionEncoderContract):
    options: Mapping[str, Any] = {"config": SHAPE}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Siglip(SiglipOptions(config=SHAPE))


class TestSiglipNormalised(VisionEncoderContract):
    options: Mapping[str, Any] = {"config": SHAPE, "layer": -1, "norm": True, "fast": True}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Siglip(SiglipOptions(**self.options))


class TestClipWithItsClassToken(VisionEncoderContract):
    options: Mapping[str, Any] = {"config": SHAPE, "select": "cls_patch"}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Clip(ClipOptions(**self.options))


def pixels(encoder: Any) -> torch.Tensor:
    return torch.stack([encoder.prepare(make_picture(seed)) for seed in range(2)])


@families
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 2])
def test_features_equal_transformers_hidden_states(
    tmp_path: Path, family: Family, layer: int
) -> None:
    model = family.make()
    model.save_pretrained(tmp_path)
    encoder = family.open(tmp_path, layer=layer)
    batch = pixels(encoder)
    with torch.no_grad():
        expected = model(batch, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)


def test_siglip_with_its_final_norm_is_the_last_hidden_state(tmp_path: Path) -> None:
    model = SIGLIP.make()
    model.save_pretrained(tmp_path)
    encoder = SIGLIP.open(tmp_path, layer=-1, norm=True)
    batch = pixels(encoder)
    with torch.no_grad():
        expected = model(batch).last_hidden_state
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)


@families
@pytest.mark.parametrize(("image_size", "patch_size"), [(30, 7), (32, 8), (27, 14)])
def test_no_patch_is_lost(family: Family, image_size: int, patch_size: int) -> None:
    shape = SHAPE | {"image_size": image_size, "patch_size": patch_size}
    encoder = family.encoder(family.encoder.Options(config=shape))
    patches = (image_size // patch_size) ** 2
    assert encoder.prefix_tokens == family.prefix
    assert encoder.tokens(image_size) == patches
    with torch.no_grad():
        assert encoder(pixels(encoder)).shape == (2, family.prefix + patches, 32)


@families
@pytest.mark.parametrize(("layer", "computed"), [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_layers_behind_the_chosen_one_are_not_computed(
    family: Family, layer: int, computed: int
) -> None:
    encoder = family.encoder(family.encoder.Options(config=SHAPE, layer=layer))
    seen: list[str] = []
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    encoder(pixels(encoder))
    blocks = {name.split("layers.")[1][0] for name in seen if "layers." in name}
    assert len(blocks) == computed
    assert not [name for name in seen if "head" in name or "post_layernorm" in name]


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ModelError, match=rf"`siglip` has 3 layers, so `layer = {layer}`"):
        Siglip(SiglipOptions(config=SHAPE, layer=layer))


def test_the_class_token_is_kept_as_the_original_does(tmp_path: Path) -> None:
    model = CLIP.make()
    model.save_pretrained(tmp_path)
    encoder = CLIP.open(tmp_path, select="cls_patch")
    batch = pixels(encoder)
    assert (encoder.prefix_tokens, encoder.tokens(30)) == (0, 17)
    with torch.no_grad():
        expected = model(batch, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)


def test_siglip_has_no_class_token_to_keep() -> None:
    with pytest.raises(ModelError, match="`siglip` has no class token"):
        Siglip(SiglipOptions(config=SHAPE, select="cls_patch"))


# -- where weights come from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "whole"),
    [(CLIP, CLIPConfig, CLIPModel), (SIGLIP, SiglipConfig, SiglipModel)],
    ids=["clip", "siglip"],
)
def test_a_whole_model_in_shards_gives_its_vision_half(
    tmp_path: Path, family: Family, config: Any, whole: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = whole(config(vision_config=SHAPE, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    capfd.readouterr()
    encoder = family.open(tmp_path, layer=-1)
    assert capfd.readouterr().err == ""  # nothing about the other half
    batch = pixels(encoder)
    with torch.no_grad():
        expected = model.vision_model(batch, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)


@families
def test_a_llava_gives_its_vision_tower(tmp_path: Path, family: Family) -> None:
    config = LlavaConfig(
        vision_config=family.vision_config(**SHAPE), text_config=LlamaConfig(**TEXT)
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    encoder = family.open(tmp_path)
    batch = pixels(encoder)
    with torch.no_grad():
        tower = model.model.vision_tower(batch, output_hidden_states=True)
        torch.testing.assert_close(encoder(batch), tower.hidden_states[-2], atol=1e-5, rtol=1e-5)


def test_another_family_is_refused(tmp_path: Path) -> None:
    SIGLIP.make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type `siglip_vision_model`, but vision encoder `clip`"):
        CLIP.open(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip2"}))
    with pytest.raises(ModelError, match="type `siglip2`"):  # NaFlex: patches of its own
        SIGLIP.open(tmp_path)


def test_weights_that_are_not_there_are_never_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    CLIP.make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "layers.1" in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"a CLIPVisionModel .* it lacks encoder\.layers\.1\."):
        CLIP.open(tmp_path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("shape", r"it has, in another shape, .* \[48\] for \[32\]"),
        ("cut", "model.safetensors is damaged or cut short"),
        ("none", "holds no weights"),
        ("not json", r"config.json is not valid JSON"),
    ],
)
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, damage: str, sentence: str) -> None:
    CLIP.make(hidden_size=48 if damage == "shape" else 32).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "shape":
        config.write_text(config.read_text().replace("48", "32"))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "none":
        weights.unlink()
    else:
        config.write_text("{")
    with pytest.raises(ModelError, match=sentence):
        CLIP.open(tmp_path)


@families
def test_half_precision_by_option(tmp_path: Path, family: Family) -> None:
    family.make().save_pretrained(tmp_path)
    for encoder in (
        family.open(tmp_path, dtype="bfloat16"),
        family.encoder(family.encoder.Options(config=SHAPE, dtype="bfloat16")),
    ):
        assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert encoder(pixels(encoder)).dtype == torch.bfloat16


# -- preprocessing ---------------------------------------------------------------------------------


def test_a_processor_beside_the_weights_decides(tmp_path: Path) -> None:
    """SigLIP 2 is bilinear; many a CLIP has colours of its own. Options win over both."""
    SIGLIP.make().save_pretrained(tmp_path)
    picture = make_picture(size=(47, 31))
    plain = SIGLIP.open(tmp_path).prepare(picture)
    processor = SiglipImageProcessorPil(
        size={"height": 30, "width": 30}, resample=Image.Resampling.BILINEAR,
        image_mean=[0.1, 0.2, 0.3],
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    encoder = SIGLIP.open(tmp_path)
    assert torch.equal(encoder.prepare(picture), expected)
    assert not torch.equal(plain, expected)
    again = SIGLIP.open(tmp_path, mean=[0.5, 0.5, 0.5], interpolation="bicubic")
    assert torch.equal(again.prepare(picture), plain)
    # and goes with them into the model folder, where the source may be gone
    (tmp_path / "model").mkdir()
    encoder.save(tmp_path / "model")
    options = SiglipOptions(source=str(tmp_path / "gone"))
    loaded = Siglip.load(options, tmp_path / "model")
    assert torch.equal(loaded.prepare(picture), expected)


@pytest.mark.parametrize("aspect", ["crop", "squash"])
def test_transformers_reads_the_processor_that_is_saved(tmp_path: Path, aspect: Any) -> None:
    encoder = Clip(ClipOptions(config=SHAPE, aspect=aspect, mean=(0.2, 0.3, 0.4)))
    encoder.save(tmp_path)
    kind: Any = CLIPImageProcessorPil if aspect == "crop" else SiglipImageProcessorPil
    theirs = kind.from_pretrained(tmp_path)
    picture = make_picture(size=(47, 31))
    expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(encoder.prepare(picture), expected)


def test_defaults_are_those_of_the_family() -> None:
    picture = make_picture(size=(47, 31))
    edges = {"height": 30, "width": 30}
    for encoder, processor in (
        (Clip(ClipOptions(config=SHAPE)),
         CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=edges)),
        (Siglip(SiglipOptions(config=SHAPE)), SiglipImageProcessorPil(size=edges)),
    ):  # fmt: skip
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(encoder.prepare(picture), expected)


# -- offline ---------------------------------------------------------------------------------------


class TestKnownShapes:
    """Parameters of the published weights, and the patches of an image."""

    clip: ClassVar[dict[str, tuple[int, int]]] = {
        "openai/clip-vit-base-patch32": (87_456_000, 49),
        "openai/clip-vit-base-patch16": (85_799_424, 196),
        "openai/clip-vit-large-patch14": (303_179_776, 256),
        "openai/clip-vit-large-patch14-336": (303_507_456, 576),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (630_766_080, 256),
    }
    siglip: ClassVar[dict[str, tuple[int, int]]] = {
        "google/siglip-base-patch16-224": (92_884_224, 196),
        "google/siglip-so400m-patch14-384": (428_225_600, 729),
        "google/siglip2-base-patch16-512": (93_520_128, 1024),
        "google/siglip2-so400m-patch14-224": (427_680_704, 256),
    }

    @pytest.mark.parametrize("name", clip)
    def test_clip(self, name: str) -> None:
        self.check(Clip, name, *self.clip[name])

    @pytest.mark.parametrize("name", siglip)
    def test_siglip(self, name: str) -> None:
        self.check(Siglip, name, *self.siglip[name])

    @staticmethod
    def check(kind: type[TransformersEncoder], name: str, parameters: int, tokens: int) -> None:
        with torch.device("meta"):
            encoder = kind(kind.Options(source=name))
        assert encoder.tokens(encoder.image_size) == tokens
        assert count_parameters(encoder) == parameters
