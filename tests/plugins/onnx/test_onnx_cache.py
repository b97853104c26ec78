"""Exports whose key-value cache has 8 bits."""

from __future__ import annotations

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
from llavakit_plugins.onnx.runtime.layout import graph_file

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


def test_batches_turns_and_samples_go_on(tmp_path: Path) -> None:
    """All that moves a cache about gives the answers of prompts that are read alone and anew."""
    model = make_model()
    options = OnnxOptions(precisions=("int8", "q8", "q4"), cache="int8")
    Onnx(options).export(model, tmp_path / "out")
    pictures = make_pictures(tmp_path)
    for precision in ("int8", "q8", "q4"):
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


def test_what_cannot_have_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'needs `operators = "microsoft"`'):
        OnnxOptions(cache="int8", operators="plain")
    with pytest.raises(ModelError, match="multiple of 8, and this model's is 12"):
        Onnx(OnnxOptions(cache="int8")).export(make_model(LANGUAGE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
