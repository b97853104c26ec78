"""The exported folder in other people's programs: transformers.js on Node and in a browser.

The JavaScript client resizes with another filter than Pillow. What that does to the pixels is
measured here: on smooth pictures less than 0.12 of a standard deviation on average.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.plugins.onnx_models import make_model

from llavakit import LlavaModel

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions

pytestmark = pytest.mark.slow
NODE = Path(__file__).parents[2] / "node"
PAGE = Path(__file__).parents[3] / "docs" / "onnx-page" / "index.html"
QUESTION = "what shape is it ?"


@dataclass(frozen=True)
class Shared:
    model: LlavaModel
    folder: Path
    square: Path
    """A picture of the encoder's own size, which no client has to resize."""
    wide: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    place = tmp_path_factory.mktemp("clients")
    model = make_model()
    names = ("fp32", "fp16", "int8", "q8", "q4")
    least = dict.fromkeys(names[1:], 0.3)
    options = OnnxOptions.model_validate({"precisions": names, "least_agreement": least})
    Onnx(options).export(model, place / "model")
    draw = np.random.default_rng(5)
    grid = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    for name, size in (("square", (32, 32)), ("wide", (200, 120))):
        grid.resize(size, Image.Resampling.BICUBIC).save(place / f"{name}.png")
    return Shared(model, place / "model", place / "square.png", place / "wide.png")


@pytest.fixture(scope="module")
def packages() -> Path:
    """The folder of the Node package with its dependencies, as package.json pins them."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    if not (NODE / "node_modules" / "@huggingface" / "transformers").is_dir():
        # onnxruntime-node would fetch CUDA libraries; this is its documented way not to
        switch = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(
            command, cwd=NODE, env={**os.environ, **switch}, capture_output=True, text=True,
            timeout=540, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"npm cannot install transformers.js here: {done.stderr.strip()[-300:]}")
    return NODE


def _ask(packages: Path, shared: Shared, picture: Path, dtype: str = "") -> dict[str, Any]:
    command: list[str | Path] = [
        "node",
        "answer.mjs",
        shared.folder,
        picture,
        QUESTION,
        "12",
        dtype,
    ]
    done = subprocess.run(
        command, cwd=packages, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_node_gives_the_tokens_that_pytorch_gives(packages: Path, shared: Shared) -> None:
    found = _ask(packages, shared, shared.square)
    config = json.loads((shared.folder / "config.json").read_text())
    rows = shared.model.prompt(QUESTION, [shared.square]).expand(shared.model.visual_tokens)
    expected = np.where(rows.visual, config["image_token_id"], rows.token_ids)
    assert found["input_ids"] == expected.tolist()
    pixels = shared.model.prepare([shared.square])
    assert pixels is not None
    assert found["shape"] == list(pixels.shape)
    np.testing.assert_allclose(found["pixels"], pixels.flatten().numpy(), atol=1e-5)
    ids = shared.model.generate_ids(QUESTION, [shared.square], max_new_tokens=12)
    assert found["new_ids"] == ids
    answer = shared.model.generate(QUESTION, [shared.square], max_new_tokens=12)
    assert found["text"].strip() == answer


def test_node_resizes_nearly_as_pillow_does(packages: Path, shared: Shared) -> None:
    found = np.asarray(_ask(packages, shared, shared.wide)["pixels"])
    pixels = shared.model.prepare([shared.wide])
    assert pixels is not None
    difference = np.abs(found - pixels.flatten().numpy())
    assert difference.mean() < 0.12


@pytest.mark.parametrize("dtype", ["fp16", "int8", "q8", "q4"])
def test_node_loads_every_precision(packages: Path, shared: Shared, dtype: str) -> None:
    from llavakit_plugins.onnx.runtime import load

    found = _ask(packages, shared, shared.square, dtype)
    assert len(found["new_ids"]) > 0
    ours = load(shared.folder, precision=dtype)
    if dtype in ("fp16", "q8"):  # the coarser ones differ between versions of onnxruntime
        assert found["new_ids"][0] == ours.generate_ids(QUESTION, [shared.square])[0]


def test_the_page_answers_in_a_browser(packages: Path, shared: Shared, tmp_path: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    modules = packages / "node_modules"
    shutil.copy(PAGE, tmp_path / "index.html")
    shutil.copytree(shared.folder, tmp_path / "model")
    shutil.copy(modules / "@huggingface/transformers/dist/transformers.min.js", tmp_path)
    for file in (modules / "onnxruntime-web" / "dist").glob("ort-wasm-simd-threaded*"):
        shutil.copy(file, tmp_path)
    server = _serve(tmp_path)
    try:
        url = f"http://127.0.0.1:{server.server_port}/index.html?dtype=fp32"
        done = subprocess.run(
            ["node", "page.mjs", chromium, url, shared.square, QUESTION],
            cwd=packages, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["outside"] == [], "everything must come from the page's own origin"
    assert answer["text"].strip() == shared.model.generate(QUESTION, [shared.square])


def _serve(folder: Path) -> Any:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server
