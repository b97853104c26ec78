"""A data set in training: what is left out is said, and samples of every sort share a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import RecipeWriter

from llavakit import Dataset, Recipe, Registry, Use
from llavakit.model.folder import create_model
from llavakit.model.images import read_pixels
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.training.corpus import Corpus


def row(identity: str, images: list[str], answer: str = "it is red .") -> dict[str, Any]:
    question = "<image> " * len(images) + "what colour is it ?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": images, "conversations": turns}


def test_left_out_samples_are_said_and_checked_data_is_not_built_again(
    write_recipe: RecipeWriter,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llavakit.cli import main

    rows = [row(f"r{n}", [f"{n}.png"]) for n in range(6)]
    rows += [row("silent", [], ""), row("gone", ["none.png"])]  # an end is learned of silence, too
    (tmp_path / "own.json").write_text(json.dumps(rows))
    old = (
        f'data = {{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    )
    new = (
        f'data = {{ use = "conversations", path = "{tmp_path}/own.json", '
        f'images = "{data}/images", unusable = "skip" }}\nunlearned = "skip"'
    )
    built: list[Path] = []
    init: Callable[..., None] = Conversations.__init__

    def count(self: Conversations, options: Any) -> None:
        built.append(options.path)
        init(self, options)

    monkeypatch.setattr(Conversations, "__init__", count)
    path = write_recipe((old, new))
    assert main([str(path), "--out", str(tmp_path / "run")]) == 0
    assert sorted(built) == sorted({*built})  # one for each step
    assert len(built) == 2
    said = capsys.readouterr().err
    assert "02-finetune: " in said
    assert "1 of 8 samples are left out" in said
    assert "none.png" in said


def test_text_and_several_images_share_a_batch(
    write_recipe: RecipeWriter, data: Path, tmp_path: Path
) -> None:
    registry = Registry.installed()
    model = create_model(Recipe.load(write_recipe(), registry).model, registry, seed=0).eval()
    sorts: dict[str, list[list[str]]] = {
        "text": [[], []],
        "one": [["0.png"], ["1.png"]],
        "two": [["2.png", "3.png"]],
    }
    parts = []
    for name, rows in sorts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([row(f"{name}{n}", images) for n, images in enumerate(rows)]))
        parts.append({"use": "conversations", "path": str(path), "images": str(data / "images")})
    mix = registry.build(Use[Dataset].model_validate({"use": "mix", "parts": parts}))
    corpus = Corpus(mix, model, model.template, 256)

    def loss(samples: list[int]) -> torch.Tensor:
        batch = corpus.pack(samples)
        found = [(mix[sample], number) for sample, number in batch.images]
        pixels = [read_pixels(model.vision, item.images[n], item.id) for item, n in found]
        with torch.no_grad():
            return model.loss(batch, model.features(torch.stack(pixels)) if pixels else None)

    together = loss([4, 0, 2, 1, 3])
    alone = sum((loss([sample]) for sample in range(5)), torch.zeros(()))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
