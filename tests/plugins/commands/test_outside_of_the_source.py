"""`llava-run import` and `export` write into no folder that they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command
from tests.plugins.onnx_models import make_model

from llavakit import save_model
from llavakit_plugins.commands.flags import writing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("command", [("import",), ("export", "--format", "hf")])
@pytest.mark.parametrize("out", ["model/sub", "model/a/b", "link/sub", "other/../model/sub"])
def test_nothing_is_written_into_the_model(
    model: Path, out: str, command: tuple[str, ...], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "other").mkdir()
    before = sorted(model.rglob("*"))
    name, *options = command
    for source in (model, tmp_path / "link"):
        text = refused(name, source, tmp_path / out, *options)
        assert text == (
            f"{tmp_path / out} lies inside {source}, which is read and must stay as it is; "
            "name a folder outside of it"
        )
    assert sorted(model.rglob("*")) == before


def test_nor_into_what_the_layout_leaves_out(
    model: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    text = refused("import", model, tmp_path / "base" / "x", "--base", tmp_path / "base")
    assert f"lies inside {tmp_path / 'base'}, which is read" in text


@pytest.mark.parametrize("words", [("export", "--format", "hf"), ("import",)])
def test_the_source_itself_is_not_said_to_be_in_the_way(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Who is told that a folder is there already, and to remove it, may do so."""
    command, *more = words
    source = tmp_path / "model"
    source.mkdir()
    (source / "model.toml").write_text("")
    text = refused(command, source, source, *more)
    assert f"{source} is the source, which is read and must stay as it is" in text
    assert "remove" not in text


@pytest.mark.parametrize("words", [("export", "--format", "hf"), ("import",)])
def test_two_processes_do_not_write_one_folder(
    model: Path, refused: Callable[..., str], llava_run: Command, tmp_path: Path,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    command, *more = words
    out = tmp_path / "a" / "out"
    with writing(out):
        said = f"another llava-run is writing {out}; wait for it, or name another folder"
        assert said in refused(command, model, out, *more)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / "theirs").write_text("")  # written meanwhile
    assert f"{out} is there already" in refused(command, model, out, *more)
    assert [path.name for path in out.parent.rglob("*")] == ["out", "theirs"]


def test_what_cannot_be_read_leaves_no_folders(refused: Callable[..., str], tmp_path: Path) -> None:
    for command in (("export", "--format", "hf"), ("import",)):
        name, *more = command
        refused(name, tmp_path / "none", tmp_path / "a" / "b" / "out", *more)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_beside_the_model_is_written(
    model: Path, llava_run: Command, tmp_path: Path
) -> None:
    """Also one whose name begins like the model's, and one that a link within it leads to."""
    (tmp_path / "elsewhere").mkdir()
    (model / "away").symlink_to(tmp_path / "elsewhere")
    for out in (tmp_path / "model-hf", model / "away" / "copy"):
        code, _, err = llava_run("import", model, out)
        assert code == 0, err
        assert (out / "model.toml").is_file()
