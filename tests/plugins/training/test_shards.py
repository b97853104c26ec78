"""Training on tar shards: as on files, each image once an epoch whoever reads it, exact resume."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from tests.conftest import RecipeWriter
from tests.core import processes
from tests.plugins.datasets.shards import write_rows
from tests.plugins.training.test_sharded import events, losses, same, sets
from tests.plugins.training.test_sharded_checkpoints import as_if_killed
from tests.plugins.training.test_tokenised import Counting
from tests.runs import run_in

from llavakit import Dataset, Recipe, Registry, Use
from llavakit.model.folder import create_model
from llavakit_plugins.datasets.tar_shards import TarImage
from llavakit_plugins.training.tokenised import corpus_of

OPTIONS = {
    "trackers": "[]",
    "steps.1.skip": "true",
    "steps.finetune.epochs": "1",
    "steps.finetune.cache_features": "false",
    "steps.finetune.checkpoint_every": "1",
    "steps.finetune.keep": "9",
    "steps.finetune.micro_batch_tokens": "512",
    "steps.finetune.train": "{ connector = 1e-4, language = 1e-4 }",
}


def noting(arguments: list[str]) -> int:
    """Run the command; which image of a shard is read, and by whom, is written down."""
    from torch.utils.data import get_worker_info

    from llavakit.cli import main

    plain = TarImage.read_bytes

    def read(self: TarImage) -> bytes:
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{self.member} {get_worker_info() is not None}\n")
        return plain(self)

    TarImage.read_bytes = read  # type: ignore[method-assign]
    return main(arguments)


@pytest.mark.slow
def test_every_image_is_read_once_an_epoch_by_any_number_of_processes_and_workers(
    write_recipe: RecipeWriter, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 rows in 5 shards: on 1 process, on 4 of 2 workers each, on 2 from the 4's checkpoint."""
    rows = json.loads((data / "train.json").read_text())
    path = write_rows(tmp_path, rows, data / "images", 5)
    old = f'use = "conversations", path = "{data}/train.json", images = "{data}/images"'
    new = f'use = "webdataset", path = "{path}", index = "{tmp_path}/index"'
    files, shards = write_recipe(), write_recipe((old, new), name="shards.toml")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def train(ranks: int, workers: int, name: str, *more: str) -> Counter[str]:
        """Return how often each image was read."""
        notes = tmp_path / "notes"
        notes.write_text("")
        own = sets(**OPTIONS, **{"steps.finetune.workers": str(workers)})
        given = (shards, *own, "--out", tmp_path / name, *more)
        ended = processes.run_ranks(tmp_path, ranks, *given, program=noting)
        assert ended.code == 0, ended.said
        read = [line.split() for line in notes.read_text().splitlines()]
        assert {by for _, by in read} == {str(workers > 0)}
        return Counter(image for image, _ in read)

    plain = tmp_path / "plain"
    assert processes.run(tmp_path, files, *sets(**OPTIONS), "--out", plain) == 0
    shown = Counter(f"{n:06}.png" for n, row in enumerate(rows) if row.get("image"))

    assert train(1, 0, "one") == shown
    assert losses(tmp_path / "one") == losses(plain)
    same(plain / "model", tmp_path / "one" / "model", atol=0)
    assert train(4, 2, "four") == shown
    assert losses(tmp_path / "four") == pytest.approx(losses(plain), abs=5e-6)
    same(plain / "model", tmp_path / "four" / "model")

    # 8 samples a step: what is read of the second and third step was not read in the first
    two = as_if_killed(tmp_path / "four", tmp_path / "two", 1)
    again = train(2, 2, "two", "--resume")
    assert [event["at"] for event in events(two, "resumed")] == [1]
    assert again < shown
    assert shown.total() - again.total() <= 8
    assert losses(two)[-2:] == pytest.approx(losses(plain)[-2:], abs=5e-6)
    same(plain / "model", two / "model")


def test_shards_are_tokenised_once_and_anew_where_one_changes(
    write_recipe: RecipeWriter, tmp_path: Path, data: Path
) -> None:
    rows = json.loads((data / "train.json").read_text())
    path = write_rows(tmp_path, rows, data / "images", 3)
    registry = Registry.installed()
    model = create_model(Recipe.load(write_recipe(), registry).parts(), registry, seed=0).eval()
    chosen = {"use": "webdataset", "path": path, "index": str(tmp_path / "index")}
    use, build = Use[Dataset].model_validate(chosen), Counting()

    def texts() -> list[list[int]]:
        run = run_in(tmp_path / "run" / "01-finetune", build)
        corpus, _ = corpus_of(run, use, model, model.template, 256)
        return [corpus.encoded(number).ids.tolist() for number in range(len(rows))]

    first = texts()
    assert texts() == first
    assert build.built == 1
    changed = [row | {"conversations": row["conversations"][:2]} for row in rows]
    write_rows(tmp_path, changed, data / "images", 3)
    again = texts()
    assert build.built == 2
    assert sum(map(len, again)) < sum(map(len, first))


def test_a_shard_that_changes_before_a_step_goes_on_is_named(
    write_recipe: RecipeWriter, tmp_path: Path, data: Path
) -> None:
    """Unless it says the same as before: then the step goes on, and ends with the same model."""
    rows = json.loads((data / "train.json").read_text())
    path = write_rows(tmp_path, rows, data / "images", 3)
    old = f'use = "conversations", path = "{data}/train.json", images = "{data}/images"'
    new = f'use = "webdataset", path = "{path}", index = "{tmp_path}/index"'
    recipe, own = write_recipe((old, new), name="shards.toml"), sets(**OPTIONS)

    def run(name: str, *more: str) -> processes.Ended:
        return processes.run_ranks(tmp_path, 2, recipe, *own, "--out", tmp_path / name, *more)

    assert run("whole").code == 0
    for name in ("touched", "changed", "gone"):
        as_if_killed(tmp_path / "whole", tmp_path / name, 1)

    write_rows(tmp_path, rows, data / "images", 3)
    os.utime(tmp_path / "shard-001.tar", (1, 1))  # copied again
    ended = run("touched", "--resume")
    assert ended.code == 0, ended.said
    assert [event["at"] for event in events(tmp_path / "touched", "resumed")] == [1]
    same(tmp_path / "whole" / "model", tmp_path / "touched" / "model", atol=0)

    changed = [row if n < 8 else row | {"conversations": row["conversations"][:2]}
               for n, row in enumerate(rows[:16])]  # fmt: skip
    write_rows(tmp_path, [*changed, *rows[16:]], data / "images", 3)
    for number in (0, 2):  # what they were
        state = (tmp_path / "whole" / "tokenised" / "steps.json").read_text()
        stamps = json.loads(state)["02-finetune"]["stamps"].popitem()[1]
        when = int(stamps[number][2].partition(";")[2])
        os.utime(tmp_path / f"shard-{number:03}.tar", ns=(when, when))
    ended = run("changed", "--resume")
    assert ended.code == 2, ended.said
    assert f"error: {tmp_path}/shard-001.tar: changed since 02-finetune began" in ended.said
    assert "or run without --resume, which starts this step over" in ended.said
    assert run("changed", "--resume").code == 2  # and again
    ended = run("changed")
    assert ended.code == 0, ended.said
    assert events(tmp_path / "changed", "resumed") == []
    assert len(list((tmp_path / "changed" / "tokenised").glob("*.safetensors"))) == 1

    for file in (tmp_path / "gone" / "tokenised").glob("*.safetensors"):
        file.unlink()
    ended = run("gone", "--resume")
    assert ended.code == 0, ended.said
    assert "shard-001.tar: not what it was when 02-finetune began" in ended.said
