"""Features on the disk: the same bits as without, for all who see the same encoder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import RecipeWriter
from tests.plugins.training.ranks import Rank, in_ranks
from torch import Tensor

from llavakit import (
    DataError,
    Dataset,
    LlavaError,
    LlavaModel,
    PackedBatch,
    Sample,
    Turn,
)
from llavakit.cli import main
from llavakit.contracts.run import ProcessGroup, Run
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.feature_cache import Kept, positions
from llavakit_plugins.training.features import Cached, features_of
from llavakit_plugins.training.options import TrainOptions


class Pictures(Dataset):
    """Each sample shows one image; `images` may be paths or files' bytes."""

    name = "pictures"

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        turns = Turn("human", "<image> what colour is it ?"), Turn("gpt", "it is red .")
        return Sample(str(index), turns, (self.images[index],))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(70):
        pixels = draw.integers(0, 256, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(70)]


RUN = Run(
    Path(), {}, None, 0, False, lambda: torch.device("cpu"), None,  # type: ignore[arg-type]
    lambda done, total, note="": None, lambda *_, **__: None, lambda: False, ProcessGroup(),
)  # fmt: skip


def kept(
    model: LlavaModel, images: Sequence[Any], folder: Path, *, most: int = 1 << 40,
    changes: dict[str, Any] | None = None, run: Run = RUN,
) -> tuple[Kept, list[int]]:  # fmt: skip
    """Return the cache of these images, and how many views the encoder reads from now on."""
    corpus = Corpus(Pictures(images), model, model.template, 256)
    counted: list[int] = []
    model.vision.register_forward_hook(lambda _, given, __: counted.append(len(given[0])))
    found = Kept(
        corpus, model, dtype=torch.float32, run=run, folder=folder, most=most,
        preparing=model.vision, changes=changes or {},
    )  # fmt: skip
    return found, counted


def loaded(features: Any, count: int) -> list[Tensor]:
    """Return the features of each sample, in micro-batches of three."""
    micros = [range(begin, min(begin + 3, count)) for begin in range(0, count, 3)]
    found: list[tuple[PackedBatch, Tensor | None]] = list(features.load(micros))
    rows = [features for _, features in found if features is not None]
    return list(torch.cat(rows))


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_the_features_are_those_of_memory_and_encoded_once(
    model: LlavaModel, pictures: list[Path], tmp_path: Path
) -> None:
    memory = Cached(
        Corpus(Pictures(pictures), model, model.template, 256), model, dtype=torch.float32,
        progress=lambda *_: None,
    )  # fmt: skip
    plain = loaded(memory, 70)
    first, counted = kept(model, pictures, tmp_path / "cache")
    assert sum(counted) == 70
    assert equal(loaded(first, 70), plain)
    again, counted = kept(model, pictures, tmp_path / "cache")
    assert equal(loaded(again, 70), plain)
    assert counted == []
    # a file of the same content elsewhere, and one's bytes, are the same image; a new one is not
    copies = [tmp_path / f"copy{n}.png" for n in range(3)]
    for copy, picture in zip(copies, pictures, strict=False):
        copy.write_bytes(picture.read_bytes())
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "teal.png")
    mixed = [*copies, pictures[3].read_bytes(), tmp_path / "teal.png", tmp_path / "teal.png"]
    third, counted = kept(model, mixed, tmp_path / "cache")
    assert counted == [1]
    assert equal(loaded(third, 6)[:4], plain[:4])


def test_another_encoder_and_another_preparation_are_kept_apart(
    model: LlavaModel, pictures: list[Path], tmp_path: Path
) -> None:
    kept(model, pictures[:4], tmp_path / "cache")
    _, counted = kept(model, pictures[:4], tmp_path / "cache", changes={"aspect": "pad"})
    assert sum(counted) == 4
    with torch.no_grad():
        next(model.vision.parameters()).flatten()[0] += 1
    _, counted = kept(model, pictures[:4], tmp_path / "cache")
    assert sum(counted) == 4
    assert len(list((tmp_path / "cache").glob("*/features-*"))) == 3
    # a file that was replaced is another image
    pictures[0].write_bytes(pictures[5].read_bytes())
    os.utime(pictures[0], ns=(1, 1))
    _, counted = kept(model, pictures[:4], tmp_path / "cache")
    assert sum(counted) == 1


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "pickle"])
def test_what_is_damaged_is_said_and_encoded_again(
    model: LlavaModel, pictures: list[Path], tmp_path: Path, damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    first, _ = kept(model, pictures, tmp_path / "cache")
    plain = loaded(first, 70)
    (file,) = (tmp_path / "cache").glob("*/features-*")
    content = bytearray(file.read_bytes())
    if damage == "bits":
        content[-2000] ^= 1  # of one image's features
    damaged = {
        "cut": bytes(content[:-9]),
        "bits": bytes(content),
        "text": b"{}",
        "pickle": b"\x80\x04N.",
    }
    file.unlink()  # `first` is mapped from the old one
    file.write_bytes(damaged[damage])
    again, _ = kept(model, pictures, tmp_path / "cache")
    found = loaded(again, 70)
    assert caplog.text.count(f"{file} is damaged") == 1
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    caplog.clear()
    last, counted = kept(model, pictures, tmp_path / "cache")
    assert sum(counted) == (70 if damage == "bits" else 0)  # removed when it was found
    assert equal(loaded(last, 70), plain)
    assert caplog.text == ""


def test_no_more_is_kept_than_was_allowed(
    model: LlavaModel, pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = kept(model, pictures, tmp_path / "all")
    plain = loaded(first, 70)
    each = plain[0].nbytes
    some, counted = kept(model, pictures, tmp_path / "cache", most=50 * each)
    assert sum(counted) == 50
    assert "the features of 20 images need" not in caplog.text
    assert "70 images need" in caplog.text
    found = loaded(some, 70)
    assert sum(counted) == 70
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_each_process_encodes_its_share(
    model: LlavaModel, pictures: list[Path], tmp_path: Path
) -> None:
    alone, _ = kept(model, pictures, tmp_path / "other")
    counted: list[tuple[int, int]] = []
    model.vision.register_forward_hook(
        lambda _, given, __: counted.append((get_ident(), len(given[0])))
    )

    def of_rank(rank: Rank) -> Kept:
        run = replace(RUN, process_group=rank)
        return kept(model, pictures, tmp_path / "cache", run=run)[0]

    whole = in_ranks(2, of_rank)
    shares = Counter[int]()
    for thread, views in counted:
        shares[thread] += views
    assert sorted(shares.values()) == [35, 35]
    for cache in whole:
        assert isinstance(cache, Kept)
        for mine, theirs in zip(loaded(cache, 70), loaded(alone, 70), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert sum(views for _, views in counted) == 70  # what the other one encoded is read


class Shard:
    """An image in a file of many, which one of two processes cannot read."""

    def __init__(self, path: Path, readers: list[int], *, damaged: bool) -> None:
        self.path, self.damaged, self.readers = path, damaged, readers

    def read_bytes(self) -> bytes:
        self.readers.append(get_ident())
        if self.damaged:
            raise DataError(f"{self.path.name} is cut short")
        return self.path.read_bytes()

    def __str__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("damaged", [0, 5])
@pytest.mark.parametrize("on_the_disk", [True, False])
def test_what_one_process_cannot_read_all_say(
    model: LlavaModel, pictures: list[Path], tmp_path: Path, damaged: int, on_the_disk: bool
) -> None:
    """None waits for one that has ended."""
    readers: list[int] = []
    shards = [Shard(path, readers, damaged=at == damaged) for at, path in enumerate(pictures)]

    def of_rank(rank: Rank) -> object:
        # what is not on the disk each process reads for itself: only the second lacks an image
        own = shards if on_the_disk or rank.rank == 1 else pictures
        corpus = Corpus(Pictures(own), model, model.template, 256)
        cache = {"feature_cache": tmp_path / "cache"} if on_the_disk else {"cache_features": True}
        data = {"use": "conversations", "path": "unread.json"}
        train = {"connector": 1e-3}
        options = TrainOptions.model_validate({"data": data, "train": train, **cache})
        return features_of(corpus, model, options, replace(RUN, process_group=rank))

    errors = in_ranks(2, of_rank)
    assert [type(error) for error in errors].count(DataError) == 1
    assert all(isinstance(error, LlavaError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert f"{damaged}.png is cut short" in str(errors[0])


def test_positions() -> None:
    draw = np.random.default_rng(1)
    keys = draw.integers(0, 1 << 63, (50, 2)).astype(np.uint64)
    wanted = np.concatenate([keys[[7, 3, 49]], keys[:1] + np.uint64(1)])
    assert positions(keys, wanted).tolist() == [7, 3, 49, -1]
    assert positions(keys[:0], wanted).tolist() == [-1] * 4


def test_a_run_ends_with_the_same_weights_and_a_plan_says_the_size(
    write_recipe: RecipeWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe())
    option = ["--set", f"steps.pretrain.feature_cache={tmp_path}/cache"]
    assert main([recipe, "--plan", *option]) == 0
    assert f"GB in {tmp_path}/cache" in capsys.readouterr().out
    for name, options in (("without", []), ("first", option), ("second", option)):
        skip = ["--set", "steps.finetune.skip=true"]
        assert main([recipe, "--out", str(tmp_path / name), *skip, *options]) == 0
    weights = [
        (tmp_path / name / "01-pretrain" / "model" / "connector.safetensors").read_bytes()
        for name in ("without", "first", "second")
    ]
    assert weights[0] == weights[1] == weights[2]
    assert len(list((tmp_path / "cache").glob("*/features-*"))) == 1
    learns = ["--set", "steps.pretrain.train={ vision = 1e-4, connector = 1e-3 }"]
    assert main([recipe, "--plan", *option, *learns]) == 2
    assert "`feature_cache` is for a frozen encoder" in capsys.readouterr().err
