"""ONNX folders of models that pool features in front of the connector: it is a graph of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.made_checkpoints import ask_hf, make_hf, read_processor
from tests.plugins.onnx_models import make_model

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript")

import llavakit
from llavakit import Exporter, ModelError, Registry, Sampling, Use, Video
from llavakit.contracts.data import IMAGE
from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.runtime import load

PRECISIONS = ("fp32", "fp16", "int8", "q8", "q4")
SUFFIXES = ("", "_fp16", "_int8", "_quantized", "_q4")
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def pooling(pool: str, newline: str = "none") -> Any:
    video = {"frames": 3, "pool": pool, "pool_features": True, "newline": newline}
    tiling = {"use": "anyres", "grids": [[1, 2]], "video": video}
    return make_model(tiling=tiling)


def pictures(count: int = 3) -> list[Image.Image]:
    draw = np.random.default_rng(5)
    sizes = [(97, 61), (30, 80), (48, 48)]
    return [
        Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        for wide, high in sizes[:count]
    ]


def questions() -> list[tuple[str, list[Any]]]:
    """Return prompts: without an image, with one, with a video, with both, with two videos."""
    one, two, three = pictures()
    clip, short = Video((one, two, three)), Video((two, one))
    shown: list[list[Any]] = [[], [one], [clip], [one, clip], [clip, two, short]]
    return [(IMAGE * len(each) + " what is it ?", each) for each in shown]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model that averages, and its folder in all precisions."""
    folder = tmp_path_factory.mktemp("pooling") / "out"
    model = pooling("average", "frame")
    use: dict[str, Any] = {"use": "onnx", "precisions": list(PRECISIONS), "block_size": 16}
    use["least_agreement"] = dict.fromkeys(PRECISIONS[1:], 0.0)  # random weights agree on nothing
    exporter = Registry.installed().build(Use[Exporter].model_validate(use))
    exporter.check(model)
    exporter.export(model, folder)
    return model, folder


def test_averages_are_those_of_torch(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    loaded = llavakit.load(folder, device="cpu")
    for prompt, shown in questions():
        found = torch.as_tensor(loaded.logits(prompt, shown))
        torch.testing.assert_close(found, model.logits(prompt, shown), atol=1e-4, rtol=1e-4)
    sampling = Sampling(6)
    assert loaded.answer_ids(questions(), sampling) == model.answer_ids(questions(), sampling)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_smaller_precisions_have_a_connector(exported: tuple[Any, Path], precision: str) -> None:
    model, folder = exported
    prompt, shown = questions()[3]
    expected = model.logits(prompt, shown).numpy()
    found = load(folder, precision=precision).logits(prompt, shown)
    apart = np.abs(found - expected).mean() / np.abs(expected).mean()
    assert 0 < apart < (0.5 if precision == "q4" else 0.1)


def test_the_folder_lists_the_graph(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    report = json.loads((folder / "export.json").read_text())
    names = {f"onnx/connector{suffix}.onnx" for suffix in SUFFIXES}
    assert names == {path.relative_to(folder).as_posix() for path in folder.rglob("connector*")}
    assert names <= report["sha256"].keys()
    assert len([text for text in report["prompts"] if IMAGE in text]) == 3  # one is of the video


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: None, "lacks onnx/connector.onnx; copy the whole folder again"),
        (lambda report: report["sha256"].pop("onnx/connector.onnx"), "does not list onnx/connec"),
        (lambda report: report["shapes"].pop("feature_width"), "nothing of a graph for the conn"),
        (
            lambda report: report["shapes"].update(feature_width=7),
            r"connector .* `features` is .*, 7\]",
        ),
    ],
)
def test_a_folder_without_its_connector_is_named(
    exported: tuple[Any, Path], tmp_path: Path, change: Any, message: str
) -> None:
    folder = copytree(exported[1], tmp_path / "copy")
    report = json.loads((folder / "export.json").read_text())
    if "lacks" in message or "list" in message:
        (folder / "onnx/connector.onnx").unlink()
    change(report)
    (folder / "export.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_precisions_that_were_not_asked_for_go(tmp_path: Path) -> None:
    options = OnnxOptions(precisions=("fp16",), least_agreement={"fp16": 0.0})
    Onnx(options).export(pooling("average"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/onnx").iterdir())
    graphs = ("connector", "decoder_model_merged", "embed_tokens", "vision_encoder")
    assert names == [f"{graph}_fp16.onnx" for graph in graphs]


def test_the_largest_are_those_of_transformers(tmp_path: Path) -> None:
    more: dict[str, Any] = {"grids": GRIDS, "family": "NextVideo", "spatial_pool_mode": "max"}
    theirs = make_hf(tmp_path / "hf", vision="clip", language="llama", **more)
    processor = read_processor(tmp_path / "hf")
    model = llavakit.load(tmp_path / "hf", device="cpu")
    figures = Onnx(OnnxOptions()).export(model, tmp_path / "out")
    assert figures["fp32 largest"] < 1e-4
    assert figures["fp32 tokens"] == 1
    loaded = load(tmp_path / "out")
    first, *_ = shown = pictures()
    frames = [one.resize((32, 32)) for one in shown]
    for images, videos in (([first], []), ([], [frames]), ([first], [frames])):
        marks = ["<image>"] * len(images) + ["<video>"] * len(videos)
        prompt = " ".join([*marks, "it is"])
        with torch.no_grad():
            expected = theirs(**ask_hf(processor, prompt, images, videos)).logits[0]
        given: list[Any] = [*images, *(Video(tuple(one)) for one in videos)]
        asked = prompt.replace("<video>", "<image>")
        found = torch.as_tensor(loaded.logits(asked, given, raw=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        answers = [
            each.generate_ids(asked, given, max_new_tokens=6, raw=True) for each in (model, loaded)
        ]
        assert answers[0] == answers[1]


_BLOCKED = """\
import json, sys
for name in ("torch", "transformers", "onnx"):
    sys.modules[name] = None
from llavakit import Video
from llavakit_plugins.onnx.runtime import load
folder, frames, question = sys.argv[1:]
print(json.dumps(load(folder).generate_ids(question, [Video(frames)], max_new_tokens=6)))
"""


def test_a_video_is_read_where_torch_cannot_be_imported(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = exported
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, picture in enumerate(pictures()):
        picture.resize((50, 40)).save(frames / f"{number}.png")
    question = f"{IMAGE} what is it ?"
    command = [sys.executable, "-c", _BLOCKED, str(folder), str(frames), question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = model.generate_ids(question, [Video(frames)], max_new_tokens=6)
    assert json.loads(done.stdout.strip().rsplit("\n", 1)[-1]) == expected
