"""Whatever a model folder's JSON files hold: a model, or one sentence, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.plugins.checkpoints.test_layouts_original import make
from tests.plugins.made_checkpoints import make_hf, pictures

import llavakit
from llavakit import LlavaError, ModelError
from llavakit.model.folder import save_model

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model folder and a folder in each layout of checkpoints."""
    place = tmp_path_factory.mktemp("folders")
    make_hf(place / "hf")
    save_model(llavakit.load(place / "hf", device="cpu"), place / "native")
    made = make(place)
    made.tower.rename(made.folder / "vision_tower")
    return {"hf": place / "hf", "native": place / "native", "original": made.folder}


VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 3, 1e308, 10**30, "", "x", "\0", "../../x", [], {}]),
    st.sampled_from([[1], ["x"], [[1]], {"a": 1}, {"": None}]),
    st.integers(),
    st.text(max_size=4),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something stands in JSON, a few levels deep; of a long table its beginning."""
    yield at
    if isinstance(value, dict | list) and len(at) < 4:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(inner)[:50]:
            yield from places(item, (*at, key))


def replaced(table: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    table = copy.deepcopy(table)
    inner = table
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return table


def rehash(folder: Path) -> None:
    """Have model.toml agree with its files, as somebody's would who means harm."""
    manifest = folder / "model.toml"
    if manifest.is_file():
        table = tomllib.loads(manifest.read_text())
        for name in table["sha256"]:
            table["sha256"][name] = sha256((folder / name).read_bytes()).hexdigest()
        manifest.write_text(tomli_w.dumps(table))


@pytest.mark.parametrize("layout", ["hf", "native", "original"])
def test_a_token_without_a_row_in_the_embedding_is_refused(folders: Folders, layout: str) -> None:
    """As many tokens as rows, and one of them far behind the others."""
    folder = folders[layout]
    (file,) = folder.rglob("tokenizer.json")
    before = file.read_bytes()
    table = json.loads(before)
    table["model"]["vocab"]["USER"] = 5000
    file.write_text(json.dumps(table))
    rehash(folder)
    try:
        with pytest.raises(ModelError, match="the tokenizer has 5001 tokens, the language model"):
            llavakit.load(folder, device="cpu")
    finally:
        file.write_bytes(before)
        rehash(folder)


@pytest.mark.parametrize("layout", ["hf", "native", "original"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_json_gives_a_model_or_a_sentence(
    folders: Folders, layout: str, data: st.DataObject
) -> None:
    folder = folders[layout]
    file = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    before = file.read_bytes()
    table = json.loads(before)
    at = data.draw(st.sampled_from(list(places(table))))
    file.write_text(json.dumps(replaced(table, at, data.draw(VALUES))))
    rehash(folder)
    said = ""
    try:
        model = llavakit.load(folder, device="cpu")
        model.generate_ids("what colour is it ?", pictures(1), max_new_tokens=1)
    except LlavaError as error:
        said = str(error)
    finally:
        file.write_bytes(before)
        rehash(folder)
    assert "\n" not in said


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "language/../../secret"])
def test_no_file_outside_of_a_folder_is_hashed(folders: Folders, name: str) -> None:
    folder = folders["native"]
    (folder.parent / "secret").write_text("s")
    manifest = folder / "model.toml"
    before = manifest.read_text()
    table = tomllib.loads(before)
    table["sha256"][name] = sha256(b"s").hexdigest()
    manifest.write_text(tomli_w.dumps(table))
    try:
        with pytest.raises(ModelError, match="is outside of it; refused"):
            llavakit.load(folder, device="cpu")
    finally:
        manifest.write_text(before)


@pytest.mark.parametrize("name", ["language/config.json", "vision/preprocessor_config.json"])
def test_a_pipe_in_a_model_folder_is_named(folders: Folders, name: str) -> None:
    folder = folders["native"]
    kept = (folder / name).read_bytes()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    try:
        with pytest.raises(ModelError, match=name):
            llavakit.load(folder, device="cpu")
    finally:
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


def test_the_onnx_report_is_read_as_it_is_meant(tmp_path: Path) -> None:
    from llavakit_plugins.onnx.runtime import folder as module
    from llavakit_plugins.onnx.runtime.layout import GRAPHS, graph_file

    (tmp_path / "onnx").mkdir()
    names = [graph_file(graph, "fp32") for graph in GRAPHS]
    for name in names:
        (tmp_path / name).write_bytes(b"s")
    shapes = dict.fromkeys(
        ("visual_tokens", "width", "vocabulary", "layers", "kv_heads", "head_dim", "max_length"), 1
    )
    report: dict[str, Any] = {
        "format": 1, "precisions": ["fp32"], "attention": "plain", "shapes": shapes,
        "preparation": {"size": 8, "aspect": "crop", "resample": "bicubic", "resized": 8,
                        "mean": [0, 0, 0], "std": [1, 1, 1]},
        "prompt": {"template": "t", "head": "", "ask": "", "image": "<image>",
                   "placement": "front", "shows_question": True, "trims": False,
                   "adds_bos": True, "beginning": [], "between": None, "stops": []},
        "end_tokens": [2], "sha256": dict.fromkeys(names, sha256(b"s").hexdigest()),
    }  # fmt: skip
    (tmp_path / "secret").write_text("s")

    def refused(change: Callable[[dict[str, Any]], object]) -> str:
        table = copy.deepcopy(report)
        change(table)
        (tmp_path / "export.json").write_text(json.dumps(table))
        with pytest.raises(ModelError) as caught:
            module.read(tmp_path, None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "export.json").write_text(json.dumps(report))
    assert module.read(tmp_path, None)[1] == "fp32"
    assert "outside of it" in refused(lambda t: t["sha256"].update({"../secret": "x"}))
    assert f"does not list {names[0]}" in refused(lambda t: t["sha256"].pop(names[0]))
    assert "`precisions`" in refused(lambda t: t.update(precisions=[]))
    assert "`precisions" in refused(lambda t: t.update(precisions=["fp3"]))
    assert "`preparation.std" in refused(lambda t: t["preparation"].update(std=["x", 1, 1]))
    assert "`preparation.std" in refused(lambda t: t["preparation"].update(std=[0, 1, 1]))
    assert "`preparation.size" in refused(lambda t: t["preparation"].update(size=0))
    assert "`shapes.layers" in refused(lambda t: t["shapes"].update(layers=-1))


def test_a_precision_that_is_a_list_is_a_sentence(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["native"], folder)
    path = folder / "language/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": [1]}))
    rehash(folder)
    with pytest.raises(LlavaError, match="transformers cannot make a LlamaForCausalLM"):
        llavakit.load(folder, device="cpu")
