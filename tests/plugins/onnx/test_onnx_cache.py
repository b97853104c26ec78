"""Exports whose key-value cache has 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import LANGUAGE
from tests.plugins.onnx_models import HEADS_OF_16, make_model, make_pictures

from llavakit import ModelError, Prefixes
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from llavakit_plugins.checkpoints.parity import cases
from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.runtime import OnnxModel, load
from llavakit_plugins.onnx.runtime.folder import read
from llavakit_plugins.onnx.runtime.layout import DECODER, REPORT, SMALL_CACHE, graph_file

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS_OF_16,
    "qwen2": {**HEADS_OF_16, "model_type": "qwen2"},  # biases: queries, keys and values stand apart
    "gemma2": {**HEADS_OF_16, "model_type": "gemma2", "head_dim": 16, "sliding_window": 12},
    "phi": {**HEADS_OF_16, "model_type": "phi", "partial_rotary_factor": 0.5},
}
QUESTION = "what colour is the picture ?"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_rounded_to_their_scales(family: str, tmp_path: Path) -> None:
    """Those of the first layer to the nearest step; behind it their rounding tells a little."""
    config = FAMILIES[family]
    model = make_model(config, use="causal-lm" if "model_type" in config else "vicuna")
    options: dict[str, Any] = {"precisions": ["fp32", "q8"], "least_agreement": {"q8": 0.5}}
    for cache in ("float", "int8"):
        asked = OnnxOptions.model_validate({**options, "cache": cache})
        Onnx(asked).export(model, tmp_path / cache)
    small, exact = (_load(tmp_path / cache) for cache in ("int8", "float"))
    graph = onnx.load(tmp_path / "int8" / graph_file("decoder_model_merged", "q8")).graph
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for case in cases(model):
        embeds_TE = small.embed(
            model.prompt(case.text, case.images, raw=case.raw), small.prepare(case.images)
        )
        pairs = zip(*(one.trace(embeds_TE)[1] for one in (small, exact)), strict=True)
        for number, (held, wanted) in enumerate(pairs):
            assert held.dtype == np.int8
            assert np.abs(held.astype(int)).max() < 127, "nothing is cut off"
            _, groups, _, width = held.shape
            step = scales[f"cache.{number}.scale"].reshape(1, groups, 1, width)
            slack = 0.001 * step if number < 2 else 0.05 * np.abs(wanted).max()
            assert (np.abs(held * step - wanted) <= 0.5 * step + slack).all()
        found, logits_TV = (one.logits(case.text, case.images) for one in (small, exact))
        assert np.abs(found - logits_TV).mean() <= 0.03 * logits_TV.std()
        _read_by_rows(small, embeds_TE)
    held, whole = (
        sum(a.nbytes for a in _cache(one, model.language.width)) for one in (small, exact)
    )
    assert held * 4 == whole


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_batches_turns_and_samples_go_on(cache: str, tmp_path: Path) -> None:
    """All that moves a cache about gives the answers of prompts that are read alone and anew."""
    model = make_model()
    precisions = ("q4",) if cache == "auto" else ("int8", "q8", "q4")
    options = OnnxOptions.model_validate({"precisions": precisions, "cache": cache})
    Onnx(options).export(model, tmp_path / "out")
    pictures = make_pictures(tmp_path)
    for precision in precisions:
        loaded = load(tmp_path / "out", precision=precision)
        plain = load(tmp_path / "out", precision=precision)
        plain.prefixes = Prefixes(0)
        prompts = [(f"{IMAGE}\n{QUESTION}", pictures[:1]), (QUESTION, []), ("a red picture", [])]
        one_by_one = [plain.answer([prompt], Sampling(6))[0] for prompt in prompts]
        if precision != "int8":  # its products round all rows of a batch with one scale
            assert plain.answer(prompts, Sampling(6)) == one_by_one
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        for _ in range(3):
            ids = loaded.generate_ids(messages, max_new_tokens=5)
            if precision != "int8":
                assert ids == plain.generate_ids(messages, max_new_tokens=5)
            messages.append({"role": "assistant", "content": loaded.decode(ids)})
            messages.append({"role": "user", "content": f"and {QUESTION}"})
        drawn = [
            [one.text for one in each.answers(QUESTION, n=3, temperature=2.0, seed=1)]
            for each in (loaded, plain)
        ]
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("beside", [False, True])
def test_q4_has_a_second_decoder_on_the_weights_of_the_first(beside: bool, tmp_path: Path) -> None:
    """Clients get the graph that they got before; on a CPU we run the one with an 8-bit cache."""
    model, (picture, _) = make_model({**HEADS_OF_16, "hidden_size": 128}), make_pictures(tmp_path)
    for cache in ("auto", "float", "int8"):
        settings = {"precisions": ["q4", "q8"], "cache": cache, "least_agreement": {"q8": 0.5}}
        over = {"external_data_over": 1000} if beside else {}
        Onnx(OnnxOptions.model_validate({**settings, **over})).export(model, tmp_path / cache)
    first = graph_file(DECODER, "q4")
    assert (tmp_path / "auto" / first).read_bytes() == (tmp_path / "float" / first).read_bytes()
    seconds = {path.parts[-3]: path for path in tmp_path.rglob(f"{SMALL_CACHE}*")}
    assert list(seconds) == ["auto"], "asked for by nobody else, and not for q8"
    tables = onnx.load(tmp_path / "int8" / first).graph.initializer
    weights = sum(len(t.raw_data) for t in tables if t.data_type == onnx.TensorProto.UINT8)
    whole = sum(path.stat().st_size for path in (tmp_path / "int8").glob(f"{first}*"))
    assert seconds["auto"].stat().st_size < whole - 0.9 * weights
    ours, floats, eights = (
        load(tmp_path / cache, precision="q4", device="cpu", threads=1)
        for cache in ("auto", "float", "int8")
    )
    found, exact, wanted = (
        one.logits(QUESTION, [picture]).tobytes() for one in (ours, floats, eights)
    )
    assert found == wanted
    assert found != exact
    prompt = (f"{IMAGE}\n{QUESTION}", [picture])
    assert ours.answer([prompt], Sampling(12)) == eights.answer([prompt], Sampling(12))
    assert _kind(ours) == _kind(eights) == np.int8
    assert _kind(floats) == np.float32
    folder, _ = read(tmp_path / "auto", "q4")
    assert folder.graph(DECODER, "q4", "cuda") == tmp_path / "auto" / first
    parity = json.loads((tmp_path / "auto" / REPORT).read_text())["parity"]
    others = json.loads((tmp_path / "int8" / REPORT).read_text())["parity"]
    assert parity["q4, int8 cache"] == others["q4"]
    assert parity["q4"] != others["q4"]


def test_a_folder_without_a_second_decoder_runs_the_first(tmp_path: Path) -> None:
    """Older exports have none."""
    Onnx(OnnxOptions(precisions=("q4",))).export(make_model(), tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    second = graph_file(SMALL_CACHE, "q4")
    (tmp_path / "out" / second).rename(tmp_path / "second")
    with pytest.raises(ModelError, match=f"lacks {second}; copy the whole folder"):
        load(tmp_path / "out", device="cpu")
    (tmp_path / "out" / second).write_bytes((tmp_path / "second").read_bytes() + b"\0")
    with pytest.raises(ModelError, match=rf"{SMALL_CACHE}_q4.onnx differs"):
        load(tmp_path / "out", device="cpu")
    (tmp_path / "out" / second).unlink()
    del report["sha256"][second]
    (tmp_path / "out" / REPORT).write_text(json.dumps(report))
    assert _kind(load(tmp_path / "out", device="cpu")) == np.float32


def test_a_second_decoder_that_agrees_too_little_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llavakit_plugins.onnx.exporter import cache

    found = cache.find_scales
    steps = lambda model, tried: [1000 * scale for scale in found(model, tried)]  # noqa: E731
    model = make_model()
    options = OnnxOptions(precisions=("q4",), cache="float")
    figures = Onnx(options).export(model, tmp_path / "float")
    monkeypatch.setattr(cache, "find_scales", steps)
    least: Any = {"q4": figures["q4 agreement"]}
    Onnx(OnnxOptions(precisions=("q4",), least_agreement=least)).export(model, tmp_path / "auto")
    assert "exported with a cache in float alone" in caplog.text
    names = [
        sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
        for place in (tmp_path / "float", tmp_path / "auto")
    ]
    assert names[0] == names[1]
    assert _kind(load(tmp_path / "auto", device="cpu")) == np.float32


def test_a_cache_in_one_piece_or_in_many_holds_the_same(tmp_path: Path) -> None:
    model = make_model()
    Onnx(OnnxOptions(precisions=("fp32",))).export(model, tmp_path / "out")
    loaded = load(tmp_path / "out", device="cpu", threads=1)
    rows_1TE = np.random.default_rng(0).normal(size=(1, 9, model.language.width))
    found = []
    for capacity in (12, 80_000):  # the larger one takes 80 MB, and no page of it that has no row
        decoder = loaded.decoder.again()
        ones = np.ones((1, 9), np.int64)
        logits = [decoder.read(rows_1TE.astype(np.float32), ones, capacity=capacity).tobytes()]
        for place in range(9, 12):
            step_11E = rows_1TE[:, place - 9 : place - 8].astype(np.float32)
            logits.append(decoder.step(step_11E, np.asarray([[place]], np.int64)).tobytes())
        held = [value[:, :, :12].tobytes() for value in decoder.held()]
        found.append((logits, held))
    assert found[0] == found[1]


def test_what_cannot_have_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'needs `operators = "microsoft"`'):
        OnnxOptions(cache="int8", operators="plain")
    with pytest.raises(ModelError, match="multiple of 8, and this model's is 12"):
        Onnx(OnnxOptions(cache="int8")).export(make_model(LANGUAGE), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options = OnnxOptions(precisions=("q4",), least_agreement={"q4": 0.0})
    Onnx(options).export(make_model(LANGUAGE), tmp_path / "out")  # has none by default
    assert _kind(load(tmp_path / "out", device="cpu")) == np.float32


def _kind(model: OnnxModel) -> Any:
    return _cache(model, model.manifest.shapes.width)[0].dtype


def _read_by_rows(model: OnnxModel, embeds_TE: Any) -> None:
    """Rows that are read together see the same numbers as each does alone."""
    together_TV, held = model.trace(embeds_TE)
    decoder = model.decoder.again()
    rows = len(embeds_TE)
    found = [decoder.read(embeds_TE[None, :1], np.ones((1, 1), np.int64), capacity=rows)[0, -1]]
    for position in range(1, rows):
        step_11E = embeds_TE[None, position : position + 1]
        logits_V = decoder.step(step_11E, np.asarray([[position]], np.int64))[0]
        found.append(logits_V.copy())  # the next step writes over it
    for alone, whole in zip(decoder.held(), held, strict=True):
        assert np.abs(alone.astype(int) - whole).max() <= 1
        assert (alone != whole).mean() <= 0.01, "but for sums that are rounded in another order"
    assert np.abs(np.stack(found) - together_TV).mean() <= 0.01 * together_TV.std()


def _load(folder: Path) -> OnnxModel:
    return load(folder, precision="q8", device="cpu", threads=1)


def _cache(model: OnnxModel, width: int) -> list[Any]:
    return model.trace(np.zeros((9, width), np.float32))[1]
