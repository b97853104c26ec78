"""Model folders: written whole, read back equal, moved, opened by transformers, and damaged."""

from __future__ import annotations

import os
import shutil
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from tests.conftest import Command, RecipeWriter

import llavakit
from llavakit import LlavaModel, ModelError, Recipe, Registry
from llavakit.model.folder import create_model, load_model, save_model

REGISTRY = Registry.installed()
PICTURE = Image.effect_noise((50, 40), 60).convert("RGB")
PROMPT = "what colour is it ?"


@pytest.fixture
def model(write_recipe: RecipeWriter) -> LlavaModel:
    return create_model(Recipe.load(write_recipe(), REGISTRY).model, REGISTRY, seed=0).eval()


@pytest.fixture
def folder(model: LlavaModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_what_is_loaded_is_what_was_saved(model: LlavaModel, folder: Path) -> None:
    loaded = llavakit.load(folder, device="cpu")
    assert isinstance(loaded, LlavaModel)
    assert not loaded.training
    for images in ([], [PICTURE]):
        assert torch.equal(loaded.logits(PROMPT, images), model.logits(PROMPT, images))
    assert loaded.generate(PROMPT, images=[PICTURE]) == model.generate(PROMPT, images=[PICTURE])
    assert loaded.visual_tokens == 16


def test_it_describes_itself(folder: Path) -> None:
    table = tomllib.loads((folder / "model.toml").read_text())
    assert table["connector"] == {"use": "mlp"}
    assert table["template"] == {"use": "vicuna_v1", "system": ""}
    assert table["widths"] == {"vision": 32, "language": 48}
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert set(table["sha256"]) == files - {"model.toml"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(
    model: LlavaModel, tmp_path: Path, umask: int
) -> None:
    from llavakit_plugins.checkpoints.hf import Hf
    from llavakit_plugins.checkpoints.original import Original

    before = os.umask(umask)
    try:
        save_model(model, tmp_path / "model")
        Hf().export(model, tmp_path / "hf")
        Original().export(model, tmp_path / "original")
    finally:
        os.umask(before)
    folders = ("model", "hf", "original")
    files = [file for name in folders for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert len(files) > 20
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_its_name_and_place_mean_nothing(
    model: LlavaModel, folder: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = folder.rename(folder.with_name("not a llava: x"))
    hidden = backbones.rename(backbones.with_name("hidden"))  # what it was made of is gone
    try:
        assert torch.equal(llavakit.load(moved, device="cpu").logits(PROMPT), model.logits(PROMPT))
        monkeypatch.chdir(moved)
        assert torch.equal(llavakit.load(".", device="cpu").logits(PROMPT), model.logits(PROMPT))
    finally:
        hidden.rename(backbones)


def test_transformers_opens_its_parts(model: LlavaModel, folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "language")
    language: Any = LlamaForCausalLM.from_pretrained(folder / "language")
    vision: Any = CLIPVisionModel.from_pretrained(folder / "vision")
    text = "what colour is the circle ?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = language(ids).logits[0]
        torch.testing.assert_close(model.logits(text, raw=True), expected, atol=1e-5, rtol=1e-5)
        pixels = model.prepare([PICTURE])
        assert pixels is not None
        features = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(model.features(pixels), features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64), ("bfloat16", torch.bfloat16),
    ("auto", torch.float32),
])  # fmt: skip
def test_it_can_be_loaded_in_another_precision(
    model: LlavaModel, folder: Path, dtype: Any, expected: torch.dtype
) -> None:
    loaded = llavakit.load(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    torch.testing.assert_close(
        loaded.logits(PROMPT, [PICTURE]), model.logits(PROMPT, [PICTURE]), atol=0.03, rtol=0.05
    )


FILES = [
    "connector.safetensors",
    "vision/model.safetensors",
    "vision/config.json",
    "language/model.safetensors",
    "language/tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, refused: Callable[..., str], name: str) -> None:
    (folder / name).unlink()
    assert f"lacks {name}; copy the whole folder again" in refused("chat", folder, "--prompt", "x")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(folder: Path, refused: Callable[..., str], name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    assert f"{folder / name} differs from what model.toml says" in refused(
        "chat", folder, "--prompt", "x"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "", "has format None"),
        (lambda text: text.replace("format = 1", "format = 2"), "has format 2"),
        (lambda text: text + "[", "is not valid TOML"),
        (lambda text: text.partition("[sha256]")[0], "lists no files under [sha256]"),
        (lambda text: text.replace("[connector]", "[konnector]"), "does not describe"),
        (lambda text: text.replace('use = "mlp"', 'use = "mlpp"'), "did you mean `mlp`?"),
        (lambda text: text.replace('use = "mlp"', 'use = "linear"'), "does not describe"),
        (lambda text: text.replace('use = "mlp"', 'use = "mlp"\nx = 1'), "does not describe"),
        (lambda text: "\udcff" + text, "is not valid TOML"),
    ],
)
def test_a_damaged_description_is_named(
    folder: Path, change: Callable[[str], str], sentence: str
) -> None:
    path = folder / "model.toml"
    path.write_bytes(change(path.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(llavakit.LlavaError) as caught:
        load_model(folder, REGISTRY)
    assert sentence in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; give the folder"):
        llavakit.load(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no model that is recognised"):
        llavakit.load(tmp_path)
    with pytest.raises(ModelError, match="is no model folder"):
        load_model(tmp_path, REGISTRY)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError):
        llavakit.load(tmp_path / "file")
    with pytest.raises(ModelError, match="device `banana`"):
        llavakit.load(tmp_path, device="banana")
    for dtype in ("banana", "int8", torch.int64, 3):
        with pytest.raises(ModelError, match=r"`dtype` is .*; it is one of None, auto, float32"):
            llavakit.load(tmp_path, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)
def test_a_failed_save_leaves_the_old_folder(
    model: LlavaModel, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def fail(place: Path) -> None:
        raise error

    monkeypatch.setattr(model.connector, "save", fail)
    with pytest.raises(llavakit.LlavaError, match="No space left on device"):
        save_model(model, str(folder))
    assert {
        f: f.read_bytes() for f in folder.parent.rglob("*") if f.is_file() and f in before
    } == before
    assert [path.name for path in folder.parent.glob(".model*")] == []


def test_import_of_a_model_folder_copies_it(
    model: LlavaModel, folder: Path, llava_run: Command, tmp_path: Path
) -> None:
    code, out, _ = llava_run("import", folder, tmp_path / "copy")
    assert code == 0
    assert f"wrote {tmp_path / 'copy'}" in out
    shutil.rmtree(folder)
    copy = llavakit.load(tmp_path / "copy", device="cpu")
    assert torch.equal(copy.logits(PROMPT, [PICTURE]), model.logits(PROMPT, [PICTURE]))
