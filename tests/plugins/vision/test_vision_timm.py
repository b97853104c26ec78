"""timm's vision transformers equal timm's own forward pass and preprocessing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from tests import published
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

from llavakit import ModelError, VisionEncoder
from llavakit.stream.images import open_image
from llavakit.testing import VisionEncoderContract, make_picture
from llavakit_plugins.vision.timm import Timm, TimmOptions

PHOTOS = sorted((published.folder() / "images").glob("*.jpg"))
SMALL: dict[str, Any] = {"img_size": 56, "depth": 3, "embed_dim": 32, "num_heads": 2}
MODELS = {
    # name: prefix tokens (class token and registers), patch
    "vit_base_patch16_siglip_224.webli": (0, 16),
    "vit_large_patch14_clip_224.openai": (1, 14),
    "vit_small_patch14_reg4_dinov2.lvd142m": (5, 14),
    "deit_tiny_distilled_patch16_224.fb_in1k": (2, 16),
    "eva02_tiny_patch14_224.mim_in22k": (1, 14),
    "vit_base_patch16_dinov3.lvd1689m": (5, 16),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (1, 16),
}
every = pytest.mark.parametrize("name", MODELS)


def size_of(name: str) -> int:
    return 4 * MODELS[name][1]


def options(name: str, **changes: Any) -> TimmOptions:
    config = SMALL | {"img_size": size_of(name)}
    table: dict[str, Any] = {"model": name, "config": config, "pretrained": False}
    return TimmOptions(**(table | changes))


def theirs(name: str) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | {"img_size": size_of(name)})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class TestDinoV2WithRegisters(VisionEncoderContract):
    name = "vit_small_patch14_reg4_dinov2.lvd142m"

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return options(self.name).model_dump(exclude_defaults=True)

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Timm(TimmOptions(**self.options))


class TestSiglipNormalised(TestDinoV2WithRegisters):
    name = "vit_base_patch16_siglip_224.webli"

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        changes: dict[str, Any] = {"layer": -1, "norm": True, "aspect": "pad", "fast": True}
        return options(self.name, **changes).model_dump(exclude_defaults=True)


def batch(encoder: Timm) -> torch.Tensor:
    return torch.stack([encoder.prepare(make_picture(seed)) for seed in range(2)])


@every
def test_features_equal_timms_own(tmp_path: Path, name: str) -> None:
    model = theirs(name)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    encoder = Timm.create(TimmOptions(source=tmp_path, layer=-1, norm=True)).eval()
    pixels = batch(encoder)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels), model.forward_features(pixels), atol=1e-5, rtol=1e-5
        )
        inner: dict[str, torch.Tensor] = {}
        model.blocks[1].register_forward_hook(lambda m, i, out: inner.update(block=out))
        model.forward_features(pixels)
        second = Timm.create(TimmOptions(source=tmp_path)).eval()  # layer -2 of 3
        torch.testing.assert_close(second(pixels), inner["block"], atol=1e-5, rtol=1e-5)


@every
def test_no_patch_is_lost_and_every_prefix_is_known(name: str) -> None:
    prefix, patch = MODELS[name]
    encoder = Timm(options(name)).eval()
    edge = size_of(name)
    assert (encoder.image_size, encoder.prefix_tokens) == (edge, prefix)
    assert encoder.tokens(edge) == (edge // patch) ** 2
    with torch.no_grad():
        features = encoder(batch(encoder))
    assert features.shape == (2, prefix + (edge // patch) ** 2, 32)
    if prefix:
        kept = Timm(options(name, select="cls_patch")).eval()
        assert (kept.prefix_tokens, kept.tokens(edge)) == (0, prefix + (edge // patch) ** 2)


def test_a_model_without_prefix_has_none_to_keep() -> None:
    with pytest.raises(ModelError, match="`timm` has no class token"):
        Timm(options("vit_base_patch16_siglip_224.webli", select="cls_patch"))


@pytest.mark.parametrize(("layer", "computed"), [(-1, 3), (-2, 2), (1, 1)])
def test_blocks_and_heads_that_nobody_sees_are_not_computed(layer: int, computed: int) -> None:
    encoder = Timm(options("vit_base_patch16_siglip_224.webli", layer=layer)).eval()
    assert encoder.model.attn_pool is not None  # it has a head that pools
    seen: list[str] = []
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    encoder(batch(encoder))
    assert len({name.split("blocks.")[1][0] for name in seen if "blocks." in name}) == computed
    assert not [name for name in seen if "attn_pool" in name or "head" in name]
    assert "model.norm" not in seen


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224.webli", *list(MODELS)[2:4]])
@pytest.mark.parametrize("aspect", [None, "crop", "squash", "pad"])
def test_pixels_equal_timms_own_transform(name: str, aspect: Any) -> None:
    # full size, on the meta device: only the preprocessing is of interest
    with torch.device("meta"):
        encoder = Timm(TimmOptions(model=name, aspect=aspect))
    config = resolve_data_config({}, pretrained_cfg=encoder.model.pretrained_cfg)
    if aspect == "squash":
        config["crop_mode"] = "squash"
    if aspect == "pad":
        config["crop_pct"] = 1.0
    transform = create_transform(**config)
    images = [make_picture(size=size) for size in ((97, 41), (31, 500), (518, 518))]
    for picture in images + [Image.open(path).convert("RGB") for path in PHOTOS]:
        expected = picture
        if aspect == "pad" and picture.width != picture.height:
            edge = max(picture.size)
            colour = tuple(int(255 * value) for value in config["mean"])
            expected = Image.new("RGB", (edge, edge), colour)
            place = (edge - picture.width) // 2, (edge - picture.height) // 2
            expected.paste(picture, place)
        assert torch.equal(encoder.prepare(picture), transform(expected))


def test_colours_and_filter_by_option() -> None:
    encoder = Timm(options(next(iter(MODELS)), mean=(0, 0, 0), std=(1, 1, 1)))
    white = Image.new("RGB", (70, 50), (255, 255, 255))
    assert torch.equal(encoder.prepare(white), torch.ones(3, 64, 64))
    other = Timm(options(next(iter(MODELS)), interpolation="bilinear"))
    picture = make_picture(size=(70, 50))
    assert not torch.equal(encoder.prepare(picture), other.prepare(picture))


def test_the_fast_path_is_near(tmp_path: Path) -> None:
    name = "vit_base_patch16_siglip_224.webli"
    with torch.device("meta"):
        exact, fast = (Timm(TimmOptions(model=name, fast=fast)) for fast in (False, True))
    for path in PHOTOS:
        slow = exact.prepare(open_image(path, "x"))
        quick = fast.prepare(open_image(path, "x", fast.decode_edge))
        assert 127.5 * (slow - quick).abs().mean() <= 4  # levels of 255


# -- where weights come from -----------------------------------------------------------------------

NAME = "vit_small_patch14_reg4_dinov2.lvd142m"


@pytest.mark.parametrize("kind", ["model.safetensors", "weights.pth"])
def test_a_file_of_weights(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    model = theirs(NAME)
    file = tmp_path / kind
    if file.suffix == ".pth":
        torch.save(model.state_dict(), file)
    else:
        save_file(model.state_dict(), file)
    for source in (file, tmp_path) if file.suffix != ".pth" else (file,):
        encoder = Timm.create(options(NAME, source=source)).eval()
        pixels = batch(encoder)
        with torch.no_grad():
            expected = model.forward_intermediates(
                pixels, indices=[1], output_fmt="NLC", intermediates_only=True
            )
            torch.testing.assert_close(encoder(pixels)[:, 5:], expected[0], atol=1e-5, rtol=1e-5)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"model": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="timm cannot make"):
        Timm.create(options(NAME, source=tmp_path / "weights.pth"))
    assert not ran.exists()


def test_weights_that_are_not_there_are_never_made_up(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = theirs(NAME).state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        Timm.create(options(NAME, source=tmp_path))


def test_timm_reads_what_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Timm(options(NAME, layer=-1, norm=True)).eval()
    encoder.save(tmp_path)
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = batch(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), model.forward_features(pixels))


def test_other_pixels_than_those_learned_from_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "vision"
    Timm(options(NAME)).save(folder)
    learned = tmp_path / "model.toml"
    learned.write_text('[vision]\nuse = "timm"\naspect = "pad"\n', "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Timm.load(options(NAME, aspect="pad"), folder)
    assert encoder.learned == {"aspect": "pad", "fast": False}
    with pytest.warns(UserWarning, match=r"`vision.aspect = 'pad'` and is given them with 'crop'"):
        encoder = Timm.load(options(NAME, aspect="crop"), folder)
    assert encoder.learned["aspect"] == "pad", "and not what it was opened with"
    with pytest.warns(UserWarning, match=r"`vision.fast = False` and is given them with True"):
        Timm.load(options(NAME, aspect="pad", fast=True), folder)


def test_a_larger_image_by_option(tmp_path: Path) -> None:
    save_for_hf(theirs(NAME), str(tmp_path), safe_serialization=True)
    encoder = Timm.create(TimmOptions(source=tmp_path, config={"img_size": 84}))
    assert (encoder.image_size, encoder.tokens(84)) == (84, 36)
    assert encoder(batch(encoder)).shape == (2, 5 + 36, 32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "vit_smal_patch14_dinov2"}, r"did you mean `vit_small_patch14_dinov2`\?"),
        ({"model": "vit_small_patch14_dinov2.none"}, "Invalid pretrained tag"),
        ({"config": {"no_such": 1}}, "timm cannot make .*no_such"),
        ({"model": "resnet18", "config": {}}, "no vision transformer .*choose a vit"),
        ({"model": "swin_tiny_patch4_window7_224", "config": {}}, "no vision transformer"),
        ({"config": SMALL | {"img_size": (28, 56)}}, "56x28 pixels, no square"),
        ({"layer": 0}, "`layer` must name a block: 1 to 3"),
        ({"layer": 7}, "has 3 layers, so `layer = 7` names none"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        Timm(options(NAME, **changes))


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give `model`"):
        TimmOptions()
    with pytest.raises(ModelError, match=r"holds no config\.json of timm's"):
        Timm.create(TimmOptions(source=tmp_path))
    save_for_hf(theirs(NAME), str(tmp_path), safe_serialization=True)
    with pytest.raises(ModelError, match="holds a `vit_small_patch14_reg4_dinov2`, not `vit_tiny"):
        Timm.create(TimmOptions(source=tmp_path, model="vit_tiny_patch16_224"))
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["architecture"] == "vit_small_patch14_reg4_dinov2"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no JSON"):
        Timm.create(TimmOptions(source=tmp_path))


def test_missing_weights_are_said_before_a_run(tmp_path: Path) -> None:
    sentence = Timm.missing(TimmOptions(model=NAME))
    assert sentence is not None
    assert f"hf download timm/{NAME}" in sentence
    assert Timm.missing(options(NAME)) is None  # new weights
    assert "does not exist" in (Timm.missing(TimmOptions(source=tmp_path / "gone")) or "")
    assert Timm.missing(TimmOptions(source=tmp_path)) is None
