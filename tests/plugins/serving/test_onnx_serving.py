"""An exported folder behind the server: its answers are those of its own `generate`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.plugins.onnx_models import make_model
from tests.plugins.serving.conftest import LIVELY, asks, picture, serving

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.runtime import OnnxModel, load

QUESTIONS = ["what is it ?", "is the circle in the picture red ?", "what colour is a square ?"]


@pytest.fixture(scope="module", params=["group_query", "plain", "small_cache"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder: Path = tmp_path_factory.mktemp("onnx") / request.param
    # heads of 12, which GroupQueryAttention does not take, leave the plain operators
    width = 48 if request.param == "plain" else 64
    language = {**LIVELY, "hidden_size": width, "initializer_range": 0.2}
    small: Any = {"precisions": ["q4"], "least_agreement": {"q4": 0.0}}
    options = OnnxOptions.model_validate(small if request.param == "small_cache" else {})
    Onnx(options).export(make_model(language), folder)
    model = load(folder, device="cpu", threads=1)
    plain = request.param == "plain"
    assert model.manifest.attention == ("plain" if plain else "group_query")
    _, held = model.trace(np.zeros((2, width), np.float32))
    assert (held[0].dtype == np.int8) == (request.param == "small_cache")
    return model


def test_answers_equal_generates_whoever_comes_and_goes(exported: OnnxModel) -> None:
    # a key whose last bit hangs on the rows beside it may be another one of 8 bits: another draw
    temperature = 0.0 if exported.precision == "q4" else 0.8
    asked: list[dict[str, Any]] = [
        {"messages": asks(QUESTIONS[n % 3], *[picture(n)] * (n % 3)), "max_tokens": 3 + 7 * (n % 5),
         "temperature": temperature * (n % 2), "seed": n}
        for n in range(20)
    ]  # fmt: skip
    alone = [
        exported.answers(
            one["messages"], max_new_tokens=one["max_tokens"],
            temperature=one["temperature"], seed=one["seed"],
        )[0].text
        for one in asked
    ]  # fmt: skip
    with serving(exported, places=4, chunk=8) as server:

        def ask(one: dict[str, Any]) -> str:
            status, body = server.chat(**one)
            assert status == 200, body
            return str(body["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, asked)) == alone


def test_several_choices_and_logprobs(exported: OnnxModel) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 5, "n": 3}
    texts = [
        answer.text for answer in exported.answers(asks(QUESTIONS[0]), max_new_tokens=9, **options)
    ]
    with serving(exported) as server:
        _, body = server.chat(
            messages=asks(QUESTIONS[0]), max_tokens=9, logprobs=True, top_logprobs=2, **options
        )
    assert [choice["message"]["content"] for choice in body["choices"]] == texts
    first = body["choices"][0]["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) == 2
    assert first["logprob"] <= 0
