"""A model folder that is opened with other pixels than the model learned from."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import llavakit


def test_other_pixels_are_said(model: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llavakit.load(model, device="cpu")
        llavakit.load(model, device="cpu", options={"vision": {"layer": -1}})
    with pytest.warns(UserWarning, match=r"with `vision.fast = False` and is given them with True"):
        llavakit.load(model, device="cpu", options={"vision": {"fast": True}})


def test_what_a_model_learned_from_is_no_other(model: Path) -> None:
    path = model / "model.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("[vision]", '[vision]\nbackend = "torchvision"', 1), "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llavakit.load(model, device="cpu")
    with pytest.warns(UserWarning, match=r"`vision.backend = 'torchvision'` and is given them"):
        llavakit.load(model, device="cpu", options={"vision": {"backend": "pil"}})
