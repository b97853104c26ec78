"""Where the model looks: the weights against transformers', the pictures against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import Command, RecipeWriter, make_tokenizer
from tests.core.peer import Bare, make_pair, their_inputs
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import Connector, LanguageModel, LlavaModel, ModelError, VisionEncoder
from llavakit.contracts.errors import DataError
from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import Packing, Rows
from llavakit.stream.attention import packed_attention
from llavakit_plugins.heatmaps.attention_maps import (
    AttentionMaps,
    WatchedRows,
    grid_edge,
    map_attention,
)
from llavakit_plugins.heatmaps.drawing import draw_attention_maps, draw_heat, seen_region
from llavakit_plugins.vision.clip import Clip, ClipOptions


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(count)
    return [
        Image.fromarray(draw.integers(0, 255, (40 + 3 * n, 36, 3), dtype=np.uint8))
        for n in range(count)
    ]


# -- the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ("USER : <image> what colour is it ? ASSISTANT :", 1),
        ("USER : <image> a red circle <image> what is it in ? ASSISTANT :", 2),
    ],
)
def test_weights_are_those_of_eager_attention(prompt: str, images: int) -> None:
    theirs, ours = make_pair()
    theirs.set_attn_implementation("eager")
    sources = pictures(images)
    maps = map_attention(ours, prompt, sources, Sampling(7), raw=True)
    inputs = their_inputs(ours, prompt, ours.prepare(sources))
    asked = inputs["input_ids"].shape[1]
    ids = ours.generate_ids(prompt, sources, max_new_tokens=7, raw=True)
    read = torch.tensor([ids[:-1]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], read], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        attentions = theirs(**inputs, output_attentions=True).attentions
    mean_TT = torch.stack([weights[0].mean(dim=0) for weights in attentions]).mean(dim=0)
    visual = (inputs["input_ids"][0] == 63).nonzero()[:, 0]
    expected = mean_TT[asked - 1 :][:, visual[: images * 16]].unflatten(1, (images, 4, 4))
    assert len(ids) == len(expected)
    torch.testing.assert_close(maps.weights_AIGG, expected, atol=1e-5, rtol=1e-5)
    assert maps.answer == ours.generate(prompt, sources, max_new_tokens=7, raw=True)
    assert "".join(maps.pieces).strip() == maps.answer


@pytest.mark.parametrize(
    "scoring",
    [{}, {"window": 3}, {"softcap": 0.7}, {"sinks_H": torch.tensor([0.0, 2.0, -1.0, 0.5])}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_watch_sees_each_sample_alone(scoring: dict[str, Any]) -> None:
    torch.manual_seed(0)
    packing = Packing.of([5, 1, 7])
    q, k, v = torch.randn(13, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 8)
    watch = WatchedRows(torch.arange(13))
    watched = Packing(packing.starts, packing.position_ids_T, watch=watch)
    out = packed_attention(q, k, v, watched, layer=3, scale=0.3, **scoring)
    assert torch.equal(out, packed_attention(q, k, v, packing, layer=3, scale=0.3, **scoring))
    assert list(watch.weights) == [3]
    weights = watch.weights[3].double()
    whole = weights.sum(dim=-1)
    if "sinks_H" in scoring:
        assert (whole < 1).all()
    else:
        torch.testing.assert_close(whole, torch.ones(4, 13).double())
    attended = torch.einsum("hrt,thk->rhk", weights, v.double().repeat_interleave(2, dim=1))
    torch.testing.assert_close(attended.float(), out, atol=1e-6, rtol=1e-5)
    assert not weights[:, 5:, :5].any()
    assert not weights[:, :6, 6:].any()


def test_a_model_that_compares_nothing_looks_everywhere_alike() -> None:
    _, ours = make_pair()
    for layer in ours.language.model.model.layers:  # type: ignore[union-attr]
        nn.init.zeros_(layer.self_attn.q_proj.weight)
    prompt = "USER : <image> what ? ASSISTANT :"
    maps = map_attention(ours, prompt, pictures(1), Sampling(3), raw=True)
    asked = ours.logits(prompt, pictures(1), raw=True).shape[0]
    rows = torch.arange(asked, asked + len(maps.pieces)).float()
    expected = (1 / rows)[:, None, None, None].expand_as(maps.weights_AIGG)
    torch.testing.assert_close(maps.weights_AIGG, expected)


# -- a model that looks at what is bright ----------------------------------------------------------


class Bright(VisionEncoder):
    """Gives each 8 x 8 patch's brightness, behind a prefix that is brighter than any."""

    name = "bright"
    width = 4
    image_size = 32
    prefix_tokens = 1

    def __init__(self, aspect: str = "crop", *, turned: bool = False) -> None:
        super().__init__()
        config = {
            "image_size": 32, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "intermediate_size": 8,
        }  # fmt: skip
        self.clip = Clip(ClipOptions.model_validate({"config": config, "aspect": aspect}))
        self.turned = turned

    def tokens(self, image_size: int) -> int:
        return (image_size // 8) ** 2

    def prepare(self, image: Image.Image) -> Tensor:
        pixels = self.clip.prepare(image)
        return pixels.flip(-1) if self.turned else pixels

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches = F.avg_pool2d(pixels_BCHW.mean(dim=1, keepdim=True), 8).flatten(1)[..., None]
        features = F.pad(patches, (0, 3))
        return torch.cat([torch.full_like(features[:, :1], 9.0), features], dim=1)


class Pool(Connector):
    """Averages blocks of `edge` x `edge` patches; or leaves some out."""

    name = "pool"

    def __init__(self, edge: int, keep: int | None = None) -> None:
        super().__init__()
        self.edge, self.keep = edge, keep

    def tokens(self, patches: int) -> int:
        return self.keep or patches // self.edge**2

    def forward(self, features_BPD: Tensor) -> Tensor:
        grid = features_BPD.transpose(1, 2).unflatten(2, (4, 4))
        return F.avg_pool2d(grid, self.edge).flatten(2).transpose(1, 2)[:, : self.keep]


class Seeker(LanguageModel):
    """One layer, one head: every row looks for a large first value."""

    name = "seeker"
    width = 4
    max_length = 256

    def __init__(self, *, shows: bool = True) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.projection = nn.Linear(4, 64)
        self.shows = shows

    def embed(self, ids_T: Tensor) -> Tensor:
        return torch.zeros(len(ids_T), 4).index_fill(1, torch.tensor([0]), -9.0)

    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        query = torch.zeros(len(embeds_TE), 1, 4)
        query[..., 0] = 1.0
        x = embeds_TE[:, None]
        if self.shows:
            x = packed_attention(query, x, x, packing, layer=0, scale=8.0)
        return x[:, 0] if rows is None else x[:, 0].index_select(0, rows.index_M)

    @property
    def head(self) -> nn.Linear:
        return self.projection

    def cache_shape(self) -> tuple[int, int, int]:
        return 1, 1, 4


def seeker(
    aspect: str = "crop", edge: int = 1, keep: int | None = None, *, shows: bool = True
) -> LlavaModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language = Seeker(shows=shows)
        vision = Bright(aspect)
    return LlavaModel(vision, Pool(edge, keep), language, Bare(), choices={})


def spot(size: tuple[int, int], place: tuple[int, int]) -> Image.Image:
    """A black image with a white spot of a sixth of its shorter edge."""
    reach = min(size) // 12
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[place[1] - reach : place[1] + reach, place[0] - reach : place[0] + reach] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("edge", [1, 2])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize(
    ("size", "place"), [((64, 64), (52, 12)), ((200, 80), (120, 60)), ((90, 240), (20, 100))]
)
def test_the_heat_lies_over_what_it_looks_at(
    aspect: str, edge: int, size: tuple[int, int], place: tuple[int, int]
) -> None:
    model, image = seeker(aspect, edge), spot(size, place)
    maps = map_attention(model, "what is it ?", [image], Sampling(2))
    weights = maps.weights_AIGG.mean(dim=0)[0].double().numpy()
    assert weights.shape == (4 // edge, 4 // edge)
    region = seen_region(model.vision, size)
    picture = np.asarray(draw_heat(image, weights, region), float)
    scale = picture.shape[1] / size[0]
    shown = image.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST)
    black = np.asarray(shown).max(axis=-1) == 0  # where only the heat gives light
    light = np.where(black, picture.sum(axis=-1), 0)
    y, x = np.argwhere(light >= light.max() - 1).mean(axis=0) / scale
    cell = (region[2] - region[0]) / (4 // edge)
    assert abs(x - place[0]) <= cell
    assert abs(y - place[1]) <= cell


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((64, 64), "crop", (0, 0, 64, 64)),
        ((300, 100), "crop", (100, 0, 200, 100)),
        ((100, 250), "crop", (0, 75, 100, 175)),
        ((300, 100), "pad", (0, -100, 300, 200)),
        ((100, 250), "pad", (-75, 0, 175, 250)),
        ((1000, 750), "crop", (125, 0, 875, 750)),
        ((9, 12), "pad", (-1.5, 0, 10.5, 12)),
    ],
)
def test_the_seen_region_is_that_of_the_arithmetic(
    size: tuple[int, int], aspect: str, expected: tuple[float, ...]
) -> None:
    found = seen_region(Bright(aspect), size)
    pixel = (expected[2] - expected[0]) / 32  # of what the encoder sees
    assert found == pytest.approx(expected, abs=0.75 * max(pixel, 1))


def test_what_was_cut_away_stays_dark_and_padding_is_not_drawn() -> None:
    image = Image.new("RGB", (300, 100), (200, 200, 200))
    weights = np.ones((4, 4))
    cut = np.asarray(draw_heat(image, weights, (100, 0, 200, 100)), int)
    assert cut.shape[:2] == (112, 336)
    assert (cut[:, :110] < 80).all()
    assert (cut[:, 115:220, 0] > 150).all()
    padded = np.asarray(draw_heat(image, weights, (0, -100, 300, 200)), int)
    assert padded.shape == cut.shape
    assert (padded[..., 0] > 150).all()


def test_a_sheet_shows_the_answer_and_each_word() -> None:
    model, image = seeker(), spot((64, 64), (52, 12))
    weights = torch.rand(4, 1, 4, 4)
    maps = AttentionMaps("a red it", ("a", " r", "ed", " it"), weights)
    words = maps.words
    assert [word for word, _ in words] == ["a", "red", "it"]
    torch.testing.assert_close(words[1][1], weights[1:3].mean(dim=0))
    alone = draw_attention_maps(AttentionMaps("", ("",), weights[:1]), [image], model.vision)
    sheet = draw_attention_maps(maps, [image], model.vision)
    assert alone.size == (336, 336)
    assert sheet.width == 336
    assert sheet.height > 336 + 64
    two = AttentionMaps("a", ("a",), weights.expand(-1, 2, -1, -1)[:1])
    assert draw_attention_maps(two, [image, image], model.vision).width > 2 * 336


# -- what cannot be drawn --------------------------------------------------------------------------


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ModelError, match="`pool` makes 7 visual tokens of 16 patches"):
        grid_edge(seeker(keep=7))
    with pytest.raises(ModelError, match="9 visual tokens of 16"):  # a square, but of what?
        grid_edge(seeker(keep=9))


def test_a_language_model_that_shows_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="`seeker` showed the attention of 0 of its 1 layers"):
        map_attention(seeker(shows=False), "what ?", pictures(1), Sampling(2))


def test_no_image_and_a_tiny_image_are_refused() -> None:
    with pytest.raises(ModelError, match="no image to look at"):
        map_attention(seeker(), "what ?", [])
    with pytest.raises(DataError, match="3x40 pixels is too small"):
        seen_region(Bright(), (3, 40))


def test_an_encoder_that_turns_the_image_is_refused() -> None:
    with pytest.raises(DataError, match="bends or turns the image"):
        seen_region(Bright(turned=True), (40, 40))


# -- the command and the report --------------------------------------------------------------------


def test_chat_draws_and_prints_only_the_answer(
    model: Path, data: Path, llava_run: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    ask: Sequence[Any] = ("chat", model, "--image", data / "images/3.png", "--max-new-tokens", 5)
    plain = llava_run(*ask, "--prompt", "what is it ?")
    out = tmp_path / "look.png"
    drawn = llava_run(*ask, "--prompt", "what is it ?", "--heatmap", out)
    assert (drawn.code, drawn.out) == (0, plain.out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert max(picture.size) >= 336
    assert "give --prompt and --image" in refused(*ask, "--heatmap", out)
    assert "give --prompt and --image" in refused("chat", model, "--prompt", "x", "--heatmap", out)
    nowhere = tmp_path / "absent" / "look.png"
    lost = llava_run(*ask, "--prompt", "what is it ?", "--heatmap", nowhere)
    assert lost.code == 2
    assert f"cannot write {nowhere.parent}" in lost.err
    assert lost.out == drawn.out  # the answer is there all the same


def test_the_report_of_an_export_shows_where_it_looks(
    write_recipe: RecipeWriter, data: Path, llava_run: Command, tmp_path: Path
) -> None:
    path = write_recipe()
    tries = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    lines = ["[[steps]]", 'use = "export"', "heatmaps = 2", "count = 4", "max_new_tokens = 4"]
    path.write_text("\n".join([path.read_text(), *lines, f"tries = {tries}", ""]))
    out = tmp_path / "run"
    skip = [part for n in (1, 2) for part in ("--set", f"steps.{n}.skip=true")]
    code, _, err = llava_run(path, "--out", out, *skip)
    assert code == 0, err
    sections = json.loads((out / "03-export" / "artifact.json").read_text())["sections"]
    gallery = sections[1]
    assert gallery["title"] == "Where it looks"
    assert len(gallery["cards"]) == 2
    for card in gallery["cards"]:
        assert (out / "03-export" / card["image"]).is_file()
    assert "Where it looks" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("heatmaps = 3", "`heatmaps` shows some of `tries`: name a data set there"),
        ("max_new_tokens = 0", "`max_new_tokens` of `export`"),
        ("max_new_tokens = 1_000_000_001", "`max_new_tokens` of `export`"),
    ],
)
def test_an_export_that_cannot_be_tried_is_refused_before_anything_is_trained(
    write_recipe: RecipeWriter, refused: Callable[..., str], option: str, sentence: str
) -> None:
    path = write_recipe()
    path.write_text(f'{path.read_text()}\n[[steps]]\nuse = "export"\n{option}\n')
    said = refused(path, "--plan")
    assert sentence in said
    assert "small.toml:" in said
