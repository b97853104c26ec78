"""A data set is tokenised once: by all processes, for all later steps, and never half."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.runs import run_in

from llavakit import (
    DataError,
    Dataset,
    LlavaError,
    LlavaModel,
    PromptTemplate,
    Registry,
    Run,
    Sample,
    Stopped,
    Turn,
    Use,
)
from llavakit_plugins.datasets.columns import Columns, write_columns
from llavakit_plugins.training import rows, workers
from llavakit_plugins.training.corpus import Batch, Corpus
from llavakit_plugins.training.corpus_key import key_of
from llavakit_plugins.training.tokenised import corpus_of
from llavakit_plugins.training.torchrun import join

COUNT = 700  # samples: three blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few samples."""
    monkeypatch.setattr(rows, "_LEAST", 256)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of conversations of many lengths, some about images."""
    path = tmp_path / "rows.json"
    found = []
    for number in range(COUNT):
        question = "<image>\nwhat colour is it ?" * (number % 3 == 0) or "and now ?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "it is red . " * (number % 7)},
        ]
        row: dict[str, Any] = {"id": f"r{number}", "conversations": turns}
        found.append(row | ({"image": f"{number % 5}.png"} if number % 3 == 0 else {}))
    path.write_text(json.dumps(found))
    return path


class Counting:
    """Builds data sets, and counts them."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, use: Use[Any], /, **context: Any) -> Any:
        self.built += 1
        return Registry.installed().build(use, **context)


def use_of(source: Path, data: Path) -> Use[Dataset]:
    chosen = {"use": "conversations", "path": str(source), "images": str(data / "images")}
    return Use[Dataset].model_validate(chosen)


def same(one: Corpus, other: Corpus) -> None:
    """Assert that two corpora are the same to the last bit."""
    assert len(one) == len(other)
    assert one.skipped == other.skipped
    assert (one.cut, one.tokens, one.mean_views) == (other.cut, other.tokens, other.mean_views)
    for sample in range(len(one.lengths)):
        mine, theirs = one.encoded(sample), other.encoded(sample)
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.supervised, theirs.supervised)
        assert list(one.images[sample]) == list(other.images[sample])
        assert one.name(sample) == other.name(sample)
    assert [*one.epoch(1, 2, 16, 300)] == [*other.epoch(1, 2, 16, 300)]


def test_a_later_step_takes_what_was_tokenised_and_builds_no_data(
    model: LlavaModel, source: Path, data: Path, tmp_path: Path
) -> None:
    build = Counting()
    use = use_of(source, data)
    get = partial(corpus_of, use=use, model=model, template=model.template, unlearned="skip")
    first, notes = get(run_in(tmp_path / "run" / "01-pretrain", build), max_length=256)
    plain = Corpus(build(use), model, model.template, 256, unlearned="skip")
    same(first, plain)
    assert notes == []
    assert build.built == 2
    again, _ = get(run_in(tmp_path / "run" / "02-finetune", build), max_length=256)
    same(again, plain)
    assert build.built == 2  # it was not even built
    worker = copy.copy(again)  # by what pickle takes, too
    assert len(pickle.dumps(again)) < 10_000
    same(worker, plain)
    assert build.built == 2
    files = [path.name for path in (tmp_path / "run" / "tokenised").glob("*.safetensors")]
    assert len(files) == 1
    # any reader of safetensors reads it
    read = load_file(tmp_path / "run" / "tokenised" / files[0])
    assert read["lengths"].tolist() == plain.lengths.tolist()
    # another length, another file; then other rows
    get(run_in(tmp_path / "run" / "02-finetune", build), max_length=40)
    assert build.built == 3
    source.write_text(source.read_text().replace("red", "blue"))
    changed, _ = get(run_in(tmp_path / "run" / "02-finetune", build), max_length=256)
    assert build.built == 4
    assert any((changed.encoded(n).ids != plain.encoded(n).ids).any() for n in range(1, 7))


def test_what_was_done_of_an_interrupted_one_is_not_done_again(
    model: LlavaModel,
    source: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Counter[int]()
    own = rows.Reading.block

    def block(self: rows.Reading, begin: int, end: int, *more: Any) -> Columns:
        asked[begin] += 1
        return own(self, begin, end, *more)

    monkeypatch.setattr(rows.Reading, "block", block)
    looks = iter([False, True])
    get = partial(
        corpus_of, use=use_of(source, data), model=model, template=model.template, max_length=256
    )
    folder = tmp_path / "run" / "01-pretrain"
    with pytest.raises(Stopped):
        get(run_in(folder, Registry.installed().build, lambda: next(looks)), unlearned="skip")
    assert sorted(asked) == [0, 256]
    (kept,) = (tmp_path / "run" / "tokenised").glob("*.blocks")
    half = next(iter(sorted(kept.iterdir())))
    half.write_bytes(half.read_bytes()[:-7])  # as no kill of ours leaves it, but a disk may
    corpus, _ = get(run_in(folder, Registry.installed().build), unlearned="skip")
    assert asked == {0: 2, 256: 1, 512: 1}
    plain = Corpus(Registry.installed().build(use_of(source, data)), model, model.template, 256,
                   unlearned="skip")  # fmt: skip
    same(corpus, plain)
    left = sorted(path.suffix for path in (tmp_path / "run" / "tokenised").iterdir())
    assert left == [".json", ".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "counts", "empty"])
def test_a_damaged_file_is_said_and_made_again(
    model: LlavaModel,
    source: Path,
    data: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    get = partial(
        corpus_of, use=use_of(source, data), model=model, template=model.template, max_length=256,
        unlearned="skip",
    )  # fmt: skip
    run = run_in(tmp_path / "run" / "01-pretrain", Registry.installed().build)
    plain, _ = get(run)
    (path,) = (tmp_path / "run" / "tokenised").glob("*.safetensors")
    content = path.read_bytes()
    if damage == "counts":
        columns = Columns.open(path)
        found = {name: np.array(columns[name]) for name in columns}
        found["record_ends"][5] += 1 << 40
        write_columns(path, [Columns(found, columns.facts)], columns.facts)
    else:
        damaged = {
            "cut": content[:-1],
            "longer": content + b"\0",
            "header": b"\xff" * 8 + content[8:],
            "empty": b"",
        }
        path.unlink()  # `plain` is mapped from the old one
        path.write_bytes(damaged[damage])
    again, _ = get(run)
    assert f"{path} is damaged" in caplog.text
    same(again, plain)
    assert path.read_bytes() == content


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tmp_path: Path) -> None:
    columns = Columns({"names": np.zeros(1 << 20, np.uint8)}, {})
    path = tmp_path / "full.safetensors"
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("this system has no /dev/full")
    (tmp_path / f".{path.name}.partial").symlink_to("/dev/full")
    with pytest.raises(LlavaError, match=r"No space left on device; free some space"):
        write_columns(path, [columns], {})
    assert list(tmp_path.iterdir()) == []


def test_a_sample_that_cannot_be_read_is_named_and_the_rest_is_kept(
    model: LlavaModel, tmp_path: Path
) -> None:
    class Broken(Dataset):
        name = "broken"

        def __len__(self) -> int:
            return 600

        def __getitem__(self, index: int) -> Sample:
            if index == 300:
                raise DataError(f"row {index} cannot be read; fix it")
            return Sample(str(index), (Turn("human", "a ?"), Turn("gpt", "b .")))

    run = run_in(tmp_path / "run" / "01-pretrain", lambda use: Broken())
    with pytest.raises(DataError, match="row 300 cannot be read"):
        corpus_of(run, Use[Dataset](use="broken"), model, model.template, 256)
    (kept,) = (tmp_path / "run" / "tokenised").glob("*.blocks")
    assert [path.name for path in kept.iterdir()] == ["000000.safetensors"]


def test_columns_travel_as_their_file_s_name(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    columns = Columns({"lengths": np.arange(1 << 16, dtype=np.int32)}, {"a": 1})
    write_columns(path, [columns, columns], {"b": 2})
    mapped = Columns.open(path)
    assert len(pickle.dumps(mapped)) < 1000
    read = copy.copy(mapped)  # by what pickle takes, too
    assert read.facts == {"b": 2}
    np.testing.assert_array_equal(read["lengths"], np.tile(np.arange(1 << 16), 2))


def _rank(
    rank: int, size: int, port: int, breaks: Sequence[int], get: Callable[[Run], Any],
    folder: Path, said: Any,
) -> None:  # fmt: skip
    """Take part as torchrun's process of this rank, and say what was done."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    made: list[int] = []
    own = rows.Reading.block

    def block(self: rows.Reading, begin: int, end: int, *more: Any) -> Columns:
        made.append(begin)
        if begin in breaks:
            raise DataError(f"row {begin} is broken; fix it")
        return own(self, begin, end, *more)

    rows.Reading.block = block  # type: ignore[assignment,method-assign]
    build = Counting()
    with join("cpu") as (group, _):
        try:
            corpus, _ = get(replace(run_in(folder, build), process_group=group))
        except LlavaError as error:
            said.put((rank, type(error).__name__, str(error)))
        else:
            said.put((rank, made, build.built, [batch.samples for batch in epoch_of(corpus)]))


def epoch_of(corpus: Corpus) -> list[Batch]:
    return list(corpus.epoch(1, 2, 16, 300))


def together(size: int, get: Callable[[Run], Any], folder: Path, *breaks: int) -> list[Any]:
    """Return what each of several processes said."""
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    with socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    given = (size, port, breaks, get, folder, said)
    processes = [fork.Process(target=_rank, args=(rank, *given)) for rank in range(size)]
    for process in processes:
        process.start()
    answers = sorted(said.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return answers


def shared(model: LlavaModel, source: Path, data: Path) -> tuple[Any, Any]:
    """Return what gets a corpus in each of several processes, and its steps as one process has
    them."""
    get = partial(
        corpus_of, use=use_of(source, data), model=model, template=model.template, max_length=256,
        unlearned="skip",
    )  # fmt: skip
    own = Corpus(Registry.installed().build(use_of(source, data)), model, model.template, 256,
                 unlearned="skip")  # fmt: skip
    return get, [batch.samples for batch in epoch_of(own)]


@pytest.mark.skipif(sys.platform != "linux", reason="the test forks")
def test_every_process_takes_its_share(
    model: LlavaModel, source: Path, data: Path, tmp_path: Path
) -> None:
    get, steps = shared(model, source, data)
    folder = tmp_path / "run" / "01-pretrain"
    assert together(2, get, folder) == [(0, [0, 512], 1, steps), (1, [256], 0, steps)]
    # now with another number of processes: nothing is left to do
    assert together(4, get, folder) == [(rank, [], 0, steps) for rank in range(4)]
    # what one process stumbles over ends all of them, with the sentence of the first sample
    source.write_text(source.read_text().replace("red", "blue"))
    sentence = "row 256 is broken; fix it"
    failed = together(3, get, folder, 512, 256)
    assert failed == [
        (0, "LlavaError", sentence), (1, "DataError", sentence), (2, "LlavaError", sentence),
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the test forks")
def test_every_process_may_have_others_that_read_for_it(
    model: LlavaModel, source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(workers, "WORTH", 1)
    monkeypatch.setattr(workers, "_PIECE", 60)
    get, steps = shared(model, source, data)
    folder = tmp_path / "run" / "01-pretrain"
    assert together(2, get, folder) == [(0, [], 1, steps), (1, [], 0, steps)]
    source.write_text(source.read_text().replace("red", "blue"))
    sentence = "row 256 is broken; fix it"
    failed = together(2, get, folder, 512, 256)
    assert failed == [(0, "LlavaError", sentence), (1, "DataError", sentence)]


def test_the_key_changes_with_what_a_data_set_is_made_of(
    model: LlavaModel, source: Path, data: Path, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run" / "01-pretrain", Registry.installed().build)

    def key(use: dict[str, Any], run: Run = run, **changed: Any) -> str:
        given: dict[str, Any] = {"template": model.template, "max_length": 256, **changed}
        return key_of(run, Use[Dataset].model_validate(use), model, **given)

    use = {"use": "conversations", "path": str(source), "images": str(data / "images")}
    first = key(use)
    os.utime(source, ns=(1, 1))  # a small file's content counts, and not its time
    assert key(use) == first
    assert len({first, key({**use, "limit": 9}), key(use, max_length=99)}) == 3
    plain = Registry.installed().build(Use[PromptTemplate].model_validate({"use": "plain"}))
    assert key(use, template=plain) != first
    (data / "images" / "new.png").write_bytes(b"")
    try:
        assert key(use) != first
    finally:
        (data / "images" / "new.png").unlink()
    # shards by a pattern, and data of another place: those of one attempt at the step
    shards = {"use": "webdataset", "path": str(tmp_path / "shard-{0..1}.tar")}
    for number in range(2):
        (tmp_path / f"shard-{number}.tar").write_bytes(b"")
    local = key(shards)
    assert key(shards) == local
    (tmp_path / "shard-1.tar").write_bytes(b"more")
    assert key(shards) != local
    hub = {"use": "huggingface", "path": "someone/something"}
    assert key(hub) != key(hub)
    (run.directory / "begun.json").write_text("{}")
    attempt = key(hub)
    assert key(hub) == attempt
    # what an earlier step wrote
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "rows.json").write_text("[1]")
    later = replace(run, earlier={"generate": tmp_path / "earlier"})
    of_step = key({"use": "conversations", "path": "@generate/rows.json"}, later)
    (tmp_path / "earlier" / "rows.json").write_text("[2]")
    assert key({"use": "conversations", "path": "@generate/rows.json"}, later) != of_step
