"""A data set in training: what is left out is said, and samples of every sort share a batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.conftest import RecipeWriter

from llavakit import (
    DataError,
    Dataset,
    ImageSource,
    LlavaModel,
    Recipe,
    Registry,
    Sample,
    Turn,
    Use,
)
from llavakit.model.folder import create_model
from llavakit.stream.images import read_pixels
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Cached, Encoding, Features, images_recur


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
    # a step that goes on takes what was tokenised: no row is read, nor looked at, once more
    (tmp_path / "run" / "02-finetune" / "artifact.json").unlink()
    assert main([str(path), "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert len(built) == 2
    (artifact,) = (tmp_path / "run").glob("02-*/artifact.json")
    assert "1 of 8 samples are left out" in artifact.read_text()
    # unless the file was changed: then it is another one
    (tmp_path / "own.json").write_text(json.dumps(rows[:-1]))
    artifact.unlink()
    assert main([str(path), "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert len(built) == 3


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


class Counted(Dataset):
    """A data set that counts how often a row is asked for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.asked = samples, Counter[int]()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        self.asked[index] += 1
        return self.samples[index]


def about(identity: str, *images: ImageSource) -> Sample:
    question = "<image> " * len(images) + "what colour is it ?"
    return Sample(identity, (Turn("human", question), Turn("gpt", "it is red .")), images)


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_is_parsed_once_for_its_tokens_and_its_images(
    model: LlavaModel, data: Path, cached: bool
) -> None:
    paths = [data / "images" / f"{n}.png" for n in range(3)]
    samples = [
        about("text"),
        about("one", paths[0]),
        about("two", *paths[1:]),
        about("b", paths[0]),
    ]
    source = Counted(samples)
    corpus = Corpus(source, model, model.template, 256)
    assert images_recur(corpus, 1, 3)
    assert not images_recur(corpus, 9, 2)
    features: Features
    if cached:
        features = Cached(corpus, model, dtype=torch.float32, progress=lambda *_: None)
    else:
        features = Encoding(corpus, model, workers=0, dtype=torch.float32, learns=False)
    found = list(features.load([[0], [1, 2], [3]]))
    assert source.asked == dict.fromkeys(range(4), 1)
    pixels = torch.stack([read_pixels(model.vision, paths[n], "") for n in range(3)])
    assert found[0][1] is None
    with torch.no_grad():
        torch.testing.assert_close(found[1][1], model.features(pixels))
        torch.testing.assert_close(found[2][1], model.features(pixels[:1]))


def test_images_that_are_no_paths_are_asked_of_the_data_set(model: LlavaModel) -> None:
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    source = Counted([about("a", red, blue), about("b", red), about("text")])
    corpus = Corpus(source, model, model.template, 256)
    assert list(corpus.images[0]) == [red, blue]
    assert corpus.images[0][0] is red
    assert corpus.images[2] == []
    assert source.asked == {0: 3, 1: 1, 2: 1}


def test_a_path_and_an_id_of_any_characters_are_kept_as_they_are(model: LlavaModel) -> None:
    odd = [Path("a b/\udcff.png"), Path("ü/图/\ud83d.png"), Path("x\n.png")]
    source = Counted([about("\ud83d", odd[0]), about("", *[]), about("ü", *odd[1:])])
    corpus = Corpus(source, model, model.template, 256)
    assert [corpus.images[n] for n in range(3)] == [odd[:1], [], odd[1:]]
    assert [corpus.name(n) for n in range(3)] == ["\ud83d", "", "ü"]
    assert source.asked == dict.fromkeys(range(3), 1)


def test_a_missing_image_names_its_sample(model: LlavaModel, tmp_path: Path) -> None:
    corpus = Corpus(Counted([about("lost", tmp_path / "no.png")]), model, model.template, 256)
    with pytest.raises(DataError, match=r"no\.png of sample `lost` does not exist"):
        list(Encoding(corpus, model, workers=0, dtype=torch.float32, learns=False).load([[0]]))
