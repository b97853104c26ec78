"""Images that several processes encode: the same features, and what is said of those that fail."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import RecipeWriter
from tests.plugins.training.test_corpus import Counted, about
from tests.plugins.training.test_tiled_training import TILED
from torch import Tensor

from llavakit import DataError, LlavaError, LlavaModel, Recipe, Registry
from llavakit.model.folder import create_model
from llavakit_plugins.training import encoding, forked, forks
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.encoding import distinct_images, encode_images

COUNT = 150
needs_forks = pytest.mark.skipif(not forks.may_fork(), reason="only Linux forks")


class Shown(NamedTuple):
    corpus: Corpus
    model: LlavaModel

    def encode(self, processes: int, told: list[int] | None = None) -> Tensor:
        def progress(done: int, total: int, note: str) -> None:
            assert (total, note) == (COUNT, "encoding images")
            if told is not None:
                told.append(done)

        images = distinct_images(self.corpus).distinct
        found = encode_images(
            self.corpus, self.model, images, torch.float32, progress, processes=processes
        )
        return torch.cat(list(found))


@pytest.fixture(params=["single", "anyres"])
def shown(
    request: pytest.FixtureRequest,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Shown:
    """One image a sample: five pieces of them, the last of which is no whole batch."""
    monkeypatch.setattr(encoding, "_PIECE", 32)
    draw = np.random.default_rng(0)
    for number in range(COUNT):
        colours = draw.integers(0, 256, (12, int(draw.integers(12, 40)), 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / f"{number}.png")
    samples = [about(str(number), tmp_path / f"{number}.png") for number in range(COUNT)]
    registry = Registry.installed()
    recipe = write_recipe(TILED) if request.param == "anyres" else write_recipe()
    model = create_model(Recipe.load(recipe, registry).parts(), registry, seed=0).eval()
    return Shown(Corpus(Counted(samples), model, model.template, 256), model)


@needs_forks
def test_processes_encode_what_one_does(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.get_num_threads() == 1
    told: list[int] = []
    together = shown.encode(3, told)
    assert told[-1] == COUNT
    assert sorted(told) == told
    assert len(told) == 5
    if shown.model.tiling is None:  # then batches are the same without pieces
        assert torch.equal(together, shown.encode(1))
    else:
        assert len(together) > COUNT
    torch.testing.assert_close(together, shown.encode(1))
    monkeypatch.setattr(forked, "may_fork", lambda: False)
    assert torch.equal(together, shown.encode(3))


@needs_forks
def test_an_image_that_cannot_be_read_is_named(shown: Shown, tmp_path: Path) -> None:
    (tmp_path / "140.png").write_bytes(b"no image")
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"140\.png"):
            shown.encode(processes)


@needs_forks
def test_a_process_that_is_killed_while_it_encodes_is_said(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()

    def killed(*_: object) -> Tensor:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(shown.corpus, "pixels", killed)
    with pytest.raises(LlavaError, match="a process that encoded images was killed"):
        shown.encode(2)
