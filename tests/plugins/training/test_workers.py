"""Many samples are read by several processes of one run: to the same bytes and words as by one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.runs import run_in

from llavakit import (
    DataError,
    Dataset,
    LlavaModel,
    Sample,
    Stopped,
    TrainingError,
    Turn,
    Use,
)
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.training import rows, workers
from llavakit_plugins.training.tokenised import corpus_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")

COUNT = 3000  # samples: twelve blocks


def _nothing(index: int) -> None: ...


class Counted(Dataset):
    """Samples of many lengths; `also` is told the number of each that is read."""

    name = "counted"

    def __init__(self, also: Callable[[int], object] = _nothing) -> None:
        self.also = also

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Sample:
        self.also(index)
        turns = (Turn("human", "a ? " * (1 + index % 5)), Turn("gpt", f"b {index} ."))
        return Sample(f"s{index}", turns)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few samples."""
    monkeypatch.setattr(rows, "_LEAST", 256)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give this process three cores, where a few samples are worth forks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(workers, "WORTH", 1)
    monkeypatch.setattr(workers, "_PIECE", 100)
    yield
    assert not multiprocessing.active_children()  # whatever a test does, none is left


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first samples of what this process reads itself."""
    begun: list[int] = []
    own, parent = rows.Reading.block, os.getpid()

    def block(self: rows.Reading, begin: int, *more: Any) -> Any:
        if os.getpid() == parent:
            begun.append(begin)
        return own(self, begin, *more)

    monkeypatch.setattr(rows.Reading, "block", block)
    return begun


def tokenised(
    folder: Path, model: LlavaModel, data: Dataset, most: int | None = None, **given: Any
) -> bytes:
    """Return the file that is made of a data set in a run's folder."""
    run = run_in(folder / "01-pretrain", lambda use: data, **given)
    begun = run.directory / "begun.json"
    begun.touch()
    os.utime(begun, ns=(1, 1))  # it is always the same attempt at the step
    corpus_of(run, Use[Dataset](use="counted"), model, model.template, 256, workers=most)
    (path,) = (folder / "tokenised").glob("*.safetensors")
    return path.read_bytes()


def kept(folder: Path) -> list[str]:
    """Return the names of the files of what is not whole yet."""
    (blocks,) = (folder / "tokenised").glob("*.blocks")
    return sorted(path.name for path in blocks.iterdir())


def test_many_processes_write_the_bytes_of_one(
    model: LlavaModel, tmp_path: Path, here: list[int]
) -> None:
    alone = tokenised(tmp_path / "one", model, Counted(), most=0)
    assert here == list(range(0, COUNT, 256))
    here.clear()
    assert tokenised(tmp_path / "many", model, Counted()) == alone
    assert here == []


def test_how_far_it_is_counts_up(
    model: LlavaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []
    run = run_in(tmp_path / "01-pretrain", lambda use: Counted())
    object.__setattr__(run, "progress", lambda done, total, note: shown.append((done, total)))
    corpus_of(run, Use[Dataset](use="counted"), model, model.template, 256)
    assert shown == sorted(shown)
    assert len(shown) >= 30
    assert shown[-1] == (COUNT, COUNT)


class Breaks:
    """What goes wrong with some samples."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __call__(self, index: int) -> None:
        if index in self.broken:
            raise DataError(f"rows.json:{index + 1}: the row cannot be read; fix it")


@pytest.mark.parametrize("most", [1, 3])
def test_the_first_row_that_cannot_be_read_is_named(
    model: LlavaModel, tmp_path: Path, most: int
) -> None:
    data = Counted(Breaks(899, 900, 1024))  # the last, first of its piece, is found first
    with pytest.raises(DataError, match=r"^rows.json:900: the row cannot be read; fix it$"):
        tokenised(tmp_path, model, data, most)
    assert kept(tmp_path) == [f"{number:06}.safetensors" for number in range(3)]
    whole = tokenised(tmp_path, model, Counted(), most)
    assert whole == tokenised(tmp_path / "other", model, Counted(), most=1)


class Speaks:
    """A library that has something to say: once, and of one sample."""

    once = False

    def __call__(self, index: int) -> None:
        if not self.once:
            self.once = True
            logging.getLogger("some.library").warning("reading slowly")
        if index == 1234:
            warnings.warn("sample 1234 is odd", UserWarning, stacklevel=1)
            print("said")
            print("said aloud", file=sys.stderr)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("most", [1, 3])
def test_what_is_said_is_said_once(
    model: LlavaModel,
    tmp_path: Path,
    most: int,
    here: list[int],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.warns(UserWarning, match="is odd") as warned:
        tokenised(tmp_path, model, Counted(Speaks()), most)
    assert [str(warning.message) for warning in warned] == ["sample 1234 is odd"]
    assert [record.message for record in caplog.records] == ["reading slowly"]
    out, err = capfd.readouterr()
    assert (out, err.count("said aloud")) == ("said\n", 1)
    if most == 3:
        assert 1 < len(here) <= 4  # each first piece, and that of the sample


def test_a_data_set_with_an_open_file_is_read_by_one_process(
    model: LlavaModel, tmp_path: Path, here: list[int]
) -> None:
    """Its position in the file would be that of all."""
    (tmp_path / "rows").write_bytes(b"x" * COUNT)

    with (tmp_path / "rows").open("rb") as file:

        def read(index: int) -> None:
            file.seek(index)
            assert file.read(1) == b"x"

        data = Counted()
        data.file, data.also = file, read  # type: ignore[attr-defined]
        alone = tokenised(tmp_path / "one", model, Counted(), most=1)
        here.clear()
        assert tokenised(tmp_path / "many", model, data) == alone
    assert len(here) == 12


class Held(Counted):
    """Holds samples' texts itself, and a column of numbers."""

    def __init__(self, texts: int) -> None:
        super().__init__()
        self.texts = [f"text {number}" for number in range(texts)]
        self.blob = bytes(1 << 25)


def test_large_objects_are_not_copied(
    model: LlavaModel, tmp_path: Path, here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised(tmp_path / "small", model, Held(100))
    assert here == []
    monkeypatch.setattr(workers, "_MOST_COPIED", 1 << 16)
    tokenised(tmp_path / "large", model, Held(20_000))
    assert len(here) == 12


class Killed:
    """Ends any other process than the one that made it, as the system does where memory lacks."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, index: int) -> None:
        if index == 2222 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_sentence(model: LlavaModel, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as found:
        tokenised(tmp_path, model, Counted(Killed()))
    assert str(found.value) == (
        "a process that read data was killed, as a system does that runs out of memory; close "
        "other programs, or set workers = 0, which reads in one process, and go on with --resume"
    )
    names = kept(tmp_path)
    assert all(name.endswith(".safetensors") for name in names)
    assert not any(name.startswith(".") for name in names)
    alone = tokenised(tmp_path / "other", model, Counted(), most=0)
    assert tokenised(tmp_path, model, Counted(Killed()), most=0) == alone  # as it says


def test_a_stop_and_a_second_ctrl_c_leave_no_process(
    model: LlavaModel, tmp_path: Path, here: list[int]
) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        tokenised(tmp_path, model, Counted(), stopping=lambda: next(asked))
    assert kept(tmp_path) == [f"{number:06}.safetensors" for number in range(3)]
    assert not multiprocessing.active_children()

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenised(tmp_path, model, Counted(), stopping=interrupted)
    assert not multiprocessing.active_children()
    assert tokenised(tmp_path, model, Counted()) == tokenised(
        tmp_path / "other", model, Counted(), most=1
    )


class Waits:
    """Says which processes read, and that each is told of Ctrl-C; the last sample takes long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, index: int) -> None:
        (self.folder / str(os.getpid())).touch()
        if index > 1000:
            time.sleep(0.2)


def _alive(process: int) -> bool:
    with suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_none_outlives_the_run(model: LlavaModel, tmp_path: Path, how: signal.Signals) -> None:
    """SIGINT reaches the others, too, as from a terminal, and only the run decides what it means:
    here it ends at once, with an error of its own."""
    (tmp_path / "seen").mkdir()

    def begin() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            tokenised(tmp_path / "run", model, Counted(Waits(tmp_path / "seen")))

    run = multiprocessing.get_context("fork").Process(target=begin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads, and a fork
        run.start()
    assert run.pid is not None
    until = time.monotonic() + 120
    while len(list((tmp_path / "seen").iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    found = [int(path.name) for path in (tmp_path / "seen").iterdir()]
    assert len(found) == 3
    assert run.pid not in found
    time.sleep(0.5)
    assert all(map(_alive, found))
    if how == signal.SIGINT:
        os.killpg(run.pid, how)
    else:
        os.kill(run.pid, how)
    run.join(60)
    assert run.exitcode == (0 if how == signal.SIGINT else -how)
    while any(map(_alive, found)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(_alive, found))


def test_each_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(cores: int, workers_: int | None = None, ranks: int = 1) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        group = ProcessGroup()
        group.size = ranks
        return workers.processes_for(group, workers_)

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [of(1), of(2), of(64)] == [1, 2, 8]
    assert [of(64, 0), of(64, 1), of(64, 5), of(2, 16)] == [1, 1, 5, 2]
    assert [of(4, ranks=2), of(4, ranks=8)] == [2, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of several machines
    assert of(16, ranks=8) == 4
    assert of(16) == 8  # a variable that this run does not hang on
    monkeypatch.setattr(sys, "platform", "darwin")
    assert of(64) == 1
