"""Videos of LLaVA-NeXT-Video and LLaVA-OneVision, against transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.made_checkpoints import ask_hf, make_hf, read_processor

import llavakit
from llavakit import ModelError, Video, save_model
from llavakit_plugins.checkpoints.hf import Hf
from llavakit_plugins.checkpoints.original import Original
from llavakit_plugins.tilings.anyres import Anyres

GRIDS = {
    "NextVideo": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
    "Onevision": [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)],
}
PARTS: dict[str, dict[str, Any]] = {
    "NextVideo": {"vision": "clip", "language": "llama"},
    "Onevision": {"vision": "siglip", "language": "qwen2"},
}
TOKENS = {"<image>": 22, "<video>": 23}
LEVEL = 1.01 / 255 / 0.26  # one of 256 levels, by the least spread: torchvision rounds otherwise


def frames(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng((seed, count))
    shape = (count, size[1], size[0], 3)
    return [Image.fromarray(one) for one in draw.integers(0, 255, shape, dtype=np.uint8)]


@pytest.fixture(scope="module", params=["average", "max", "Onevision"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("video") / "checkpoint"
    family, more = request.param, {}
    if family != "Onevision":
        family, more = "NextVideo", {"spatial_pool_mode": request.param}
    made = make_hf(folder, grids=GRIDS[family], family=family, **PARTS[family], **more)
    return made, folder


def same_answer(
    theirs: Any, processor: Any, ours: Any, prompt: str, shown: Sequence[Any], level: float = 1e-6
) -> int:
    """Check pixels, ids, logits and a greedy answer; return how many rows are visual.

    Pixels of frames may differ by `level`, and transformers' class gets ours.
    """
    images = [one for one in shown if isinstance(one, Image.Image)]
    videos = [one for one in shown if isinstance(one, list)]
    inputs = ask_hf(processor, prompt, images, videos)
    marks = [word for word in prompt.split() if word in TOKENS]
    given = [Video(tuple(one)) if isinstance(one, list) else one for one in shown]
    asked = prompt.replace("<video>", "<image>")
    encoded = ours.prompt(asked, given, raw=True)
    rows = encoded.expand(ours.visual_tokens)
    ids = rows.token_ids.copy()
    ids[rows.visual] = np.repeat(
        [TOKENS[mark] for mark in marks], [len(one.index_RK) for one in encoded.arranged]
    )
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    views = ours.prepare(given).split([one.views for one in encoded.arranged])
    parts = list(zip(marks, views, strict=True))
    moving = [view for mark, view in parts if mark == "<video>"]
    for found, pixels in zip(moving, inputs["pixel_values_videos"], strict=True):
        assert found.shape == pixels.shape
        assert (found - pixels).abs().max() <= level
    stills = [view for mark, view in parts if mark == "<image>"]
    for found, pixels in zip(stills, inputs.get("pixel_values", ()), strict=True):
        assert torch.equal(found, pixels[: len(found)])
    inputs["pixel_values_videos"] = torch.stack(moving)
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(ours.logits(asked, given, raw=True), expected, atol=1e-5, rtol=1e-5)
    found = theirs.generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=3
    )
    tokens = found[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.generate_ids(asked, given, max_new_tokens=3, raw=True) == tokens
    return int(rows.visual.sum())


ONE = "USER : <video> what is it ? ASSISTANT :"


def test_what_transformers_saved_is_the_same_model(checkpoint: tuple[Any, Path]) -> None:
    theirs, folder = checkpoint
    ours = llavakit.load(folder, device="cpu")
    processor = read_processor(folder)
    end = int(theirs.config.model_type == "llava_onevision")  # a row behind the video
    for count in range(1, 33):
        assert same_answer(theirs, processor, ours, ONE, [frames(count)]) == 4 * count + end
    # and resized; where an odd number of lines is cropped, torchvision's may begin one lower
    for size in ((50, 40), (300, 31), (640, 480)):
        same_answer(theirs, processor, ours, ONE, [frames(3, size)], LEVEL)


@pytest.mark.parametrize(("prompt", "shown"), [
    ("USER : <video> a red circle <video> is it ? ASSISTANT :", [2, 2]),
    ("USER : <image> a red <video> is it ? ASSISTANT :", [(50, 40), 3]),
    ("USER : <video> a red <image> is it ? ASSISTANT :", [1, (33, 90)]),
    ("USER : <image> in <video> a <image> <video> ? ASSISTANT :", [(50, 40), 2, (300, 31), 2]),
])  # fmt: skip
def test_images_and_videos_of_one_sample(
    checkpoint: tuple[Any, Path], prompt: str, shown: list[Any]
) -> None:
    theirs, folder = checkpoint
    given = [
        frames(one, seed=n) if isinstance(one, int) else frames(1, one, n)[0]
        for n, one in enumerate(shown)
    ]
    same_answer(theirs, read_processor(folder), llavakit.load(folder, device="cpu"), prompt, given)


def test_an_export_is_the_same_model(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    import transformers

    made, folder = checkpoint
    model = llavakit.load(folder, device="cpu")
    options = model.tiling.options
    video = options.video.model_copy(update={"frames": 7, "rate": 2.5, "spread": "parts"})
    model.tiling = Anyres(options.model_copy(update={"video": video}))
    figures = Hf().export(model, tmp_path / "out")
    assert figures["prompts"] == 4  # one of them shows a video
    assert figures["largest_logit_difference"] < 1e-5
    kind: Any = getattr(transformers, type(made).__name__)
    again, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    back = llavakit.load(tmp_path / "out", device="cpu")
    assert back.tiling.options.video == video
    processor, theirs = read_processor(tmp_path / "out"), read_processor(folder)
    for part in ("image_processor", "video_processor"):
        own, other = (getattr(one, part).to_dict() for one in (processor, theirs))
        assert own | {"size": None} == other | {"size": None}
    shown = [frames(2), frames(1, (50, 40))[0]]
    same_answer(again.eval(), processor, back, "USER : <video> is <image> ASSISTANT :", shown)
    # a chat names what it shows by its parts
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "what is it ?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert chat.count("<video>") == chat.count("<image>") == 1
    assert chat.index("<video>") < chat.index("<image>") < chat.index("what")
    save_model(back, tmp_path / "native")
    assert llavakit.load(tmp_path / "native", device="cpu").tiling.options.video == video


@pytest.mark.parametrize("video", [
    {"pool": "none"}, {"newline": "frame"}, {"stride": 3}, {"pool": "average"},
])  # fmt: skip
def test_other_videos_do_not_fit(checkpoint: tuple[Any, Path], video: dict[str, Any]) -> None:
    model = llavakit.load(checkpoint[1], device="cpu")
    options = model.tiling.options
    if video == {"pool": "average"}:
        video = {"pool_features": not options.video.pool_features}
    changed = options.video.model_copy(update=video)
    model.tiling = Anyres(options.model_copy(update={"video": changed}))
    with pytest.raises(ModelError, match="with this `video` does not fit"):
        Hf().check(model)


def test_frames_become_squares_as_transformers_makes_them(checkpoint: tuple[Any, Path]) -> None:
    model = llavakit.load(checkpoint[1], device="cpu")
    model.vision.square = model.vision.square._replace(aspect="pad")
    with pytest.raises(ModelError, match="with this `video` does not fit"):
        Hf().check(model)


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"spatial_pool_mode": "conv"}, "average and max can be read"),
    ({"spatial_pool_stride": 0}, "average and max can be read"),
    ({"llavakit": {"video": {"frames": 0}}}, "says of videos what cannot be used"),
    ({"llavakit": {"video": {"rate": "fast"}}}, "says of videos what cannot be used"),
])  # fmt: skip
def test_what_is_not_known_of_videos_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    make_hf(tmp_path / "m", grids=GRIDS["NextVideo"], family="NextVideo")
    with pytest.raises(ModelError, match=sentence):
        llavakit.load(edited(tmp_path / "m", **changes), device="cpu")


def test_other_colours_of_frames_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_hf(tmp_path / "m", grids=GRIDS["NextVideo"], family="NextVideo")
    llavakit.load(tmp_path / "m", device="cpu")
    assert "other colours" not in caplog.text
    path = tmp_path / "m" / "processor_config.json"
    table = json.loads(path.read_text())
    table["video_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(table))
    llavakit.load(tmp_path / "m", device="cpu")
    assert "prepares frames of videos with other colours than images" in caplog.text


def test_frames_fill_at_most_half_of_what_is_read(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS["NextVideo"], family="NextVideo")
    assert llavakit.load(tmp_path / "m", device="cpu").tiling.options.video.frames == 32
    table = json.loads((tmp_path / "m" / "config.json").read_text())
    table["text_config"]["max_position_embeddings"] = 160
    model = llavakit.load(edited(tmp_path / "m", **table), device="cpu")
    assert model.tiling.options.video.frames == 20  # of four rows each


def test_the_original_shows_no_videos(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS["NextVideo"], family="NextVideo")
    with pytest.raises(ModelError, match="does not show videos"):
        Original().check(llavakit.load(tmp_path / "m", device="cpu"))
