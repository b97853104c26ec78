"""The ledger alone: what is written stays, whatever happens, and old ones are taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.processes import small_disk

from llavakit import DataError, LlavaError, Message, Reply
from llavakit_plugins.generation.requests.ledger import Entry, Ledger, Request, record_of


def entry(number: int = 0, identity: str = "a model", **changes: Any) -> Entry:
    request = Request((Message("user", f"question {number}"),), label=f"q{number}")
    made = record_of(identity, request).entry(Reply(f"text {number}", usd=0.5))
    return replace(made, **changes)


def lines(path: Path, entries: Sequence[Entry], behind: bytes = b"") -> bytes:
    """Write a ledger as ledgers were before they were databases; return its content."""
    data = b"".join(json.dumps(asdict(each)).encode() + b"\n" for each in entries) + behind
    path.write_bytes(data)
    return data


def texts(path: Path) -> list[str]:
    with Ledger(path, writable=False) as ledger:
        return [each.text for each in ledger]


def files(folder: Path) -> set[str]:
    """Return what lies in a folder; locks are of no account."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_what_is_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    odd = "naïve 東京 🍩 \u2028 \ud800 \x00"
    with Ledger(path) as ledger:
        ledger.append(entry(0))
        ledger.append(entry(1, text=odd))
        ledger.append(entry(0, text="another"))  # of the same key: the first one counts
        assert len(ledger) == 2
    with Ledger(path) as again:
        assert [item.text for item in again] == ["text 0", odd]
        assert again.get(entry(1).key) == entry(1, text=odd, time=again.get(entry(1).key).time)  # type: ignore[union-attr]
        assert again.get(entry(7).key) is None
        assert (again.spent, again.usd, len(again)) == (1.0, 1.0, 2)
        assert (entry(1).key in again, entry(7).key in again) == (True, False)
    assert files(tmp_path) == {"ledger.sqlite"}


def test_anybody_can_read_it_with_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.append(entry(0), entry(1, usd=None, input_tokens=7))
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT label, text, usd, input_tokens FROM entries").fetchall()
        assert rows == [("q0", "text 0", 0.5, None), ("q1", "text 1", None, 7)]
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_replies_of_any_chat_model_are_found_by_messages_and_draw(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append(entry(0, "one"), entry(1, "two", text="two"))
        found = ledger.reply_to(entry(1).prompt, 0)
        assert found is not None
        assert found.text == "two"
        assert ledger.reply_to(entry(1).prompt, 1) is None


# -- two at once, and none any more ----------------------------------------------------------------


def write_until_killed(path: Path, said: Path) -> None:
    with Ledger(path) as ledger, said.open("a") as file:
        for number in range(len(ledger), 10**6):
            ledger.append(entry(number, text="x" * (number % 3000)))
            print(number, file=file, flush=True)


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_what_was_written_when_a_kill_came_is_there(tmp_path: Path, kills: int) -> None:
    path, said = tmp_path / "ledger.sqlite", tmp_path / "said"
    draw = random.Random(3)
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=write_until_killed, args=(path, said)
        )
        process.start()
        time.sleep(0.05 + draw.random() * 0.2)
        if _ == 0:  # while it writes, another may read, and none may write
            while not (said.exists() and said.stat().st_size):
                time.sleep(0.01)
            told = said.read_text().count("\n")
            assert len(texts(path)) >= told > 0
            with pytest.raises(LlavaError, match="another process asks by the ledger"):
                Ledger(path)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        told = len(said.read_text().splitlines()) if said.exists() else 0
        with Ledger(path) as ledger:
            assert told <= len(ledger) <= told + kills
            assert [each.label for each in ledger] == [f"q{n}" for n in range(len(ledger))]
            assert ledger.spent == len(ledger) / 2
    assert told > kills


def test_a_full_disk_leaves_whole_replies_and_a_sentence(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512):
        path = tmp_path / "disk" / "ledger.sqlite"
        padding = tmp_path / "disk" / "padding"
        padding.write_bytes(bytes(200_000))

        def fill(ledger: Ledger) -> None:
            for number in range(1000):
                ledger.append(entry(number, text="x" * 700))

        with Ledger(path) as ledger:
            with pytest.raises(LlavaError, match=r"cannot write .*ledger\.sqlite: no space left"):
                fill(ledger)
            count = len(ledger)
            assert 0 < count < 1000
            padding.unlink()  # the same ledger goes on
            ledger.append(entry(1000))
        with Ledger(path) as again:
            assert len(again) == count + 1
            assert [item.label for item in again] == [f"q{n}" for n in (*range(count), 1000)]


def test_a_disk_that_is_full_at_the_beginning_is_a_sentence(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64):
        (tmp_path / "disk" / "padding").write_bytes(bytes(60_000))
        with pytest.raises(LlavaError, match="cannot write"):
            Ledger(tmp_path / "disk" / "ledger.sqlite")
        assert files(tmp_path / "disk") == {"padding"}


# -- damaged ---------------------------------------------------------------------------------------


def test_a_damaged_database_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for number in range(60):
            ledger.append(entry(number, text=f"text {number} " * 40))
    data, draw, named = path.read_bytes(), random.Random(5), 0
    for _ in range(150):
        broken = bytearray(data[: draw.choice((len(data), draw.randrange(len(data))))])
        for _ in range(draw.choice((0, 1, 40))):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        if not broken.startswith(b"SQLite format 3\x00"):
            continue  # taken for lines of JSON
        path.write_bytes(broken)
        try:
            with Ledger(path) as ledger:
                # where an index is off: the row is there, and its key is not found
                named += any(ledger.get(each.key) != each for each in ledger)
        except LlavaError as error:
            said = str(error)
            named += "ledger.sqlite" in said
            assert re.search("recover|delete it|newer|cannot write", said), said
        path.with_name("ledger.sqlite-wal").unlink(missing_ok=True)
    assert named > 60


def test_a_row_that_is_none_is_named_and_can_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.append(entry(0), entry(1), entry(2))
    for change in ("usd = 'x'", "text = x'ff'", "key = 'zz'", "identity = 7", "draw = -1"):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(f"UPDATE replies SET {change} WHERE number = 2")
        with pytest.raises(DataError, match=r"reply 2 in .*ledger\.sqlite is damaged") as raised:
            texts(path)
    remedy = str(raised.value).partition('"')[2].rstrip('"')
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(remedy)
    with Ledger(path) as ledger:
        assert [each.text for each in ledger] == ["text 0", "text 2"]
        assert len(ledger) == 2
        ledger.append(entry(1))
        assert len(ledger) == 3


def test_what_is_no_ledger_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE mine (a)")
    before = path.read_bytes()
    for writable in (True, False):
        with pytest.raises(DataError, match="or no ledger"):
            Ledger(path, writable=writable)
    assert path.read_bytes() == before
    newer = tmp_path / "newer.sqlite"
    with Ledger(newer):
        pass
    with closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(DataError, match="of a newer llavakit"):
        Ledger(newer)


# -- taken over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
def test_lines_of_json_are_taken_over_once_and_kept(tmp_path: Path, beside: bool) -> None:
    old = tmp_path / "ledger.jsonl"
    path = old.with_suffix(".sqlite") if beside else old
    said = [entry(0), entry(1, text="\ud800 東京"), entry(0, text="of the same key")]
    before = lines(old, said, b'{"key": "half a li')
    assert texts(path) == ["text 0", "\ud800 東京"]  # read, and not changed
    assert files(tmp_path) == {"ledger.jsonl"}
    with Ledger(path) as ledger:
        assert [each.text for each in ledger] == ["text 0", "\ud800 東京"]
        assert ledger.get(entry(1).key) == said[1]
        ledger.append(entry(2))
        assert (len(ledger), ledger.spent) == (3, 1.5)
    kept = old if beside else tmp_path / "ledger.jsonl.old"
    assert kept.read_bytes() == before
    assert len(files(tmp_path)) == 2
    with Ledger(path) as ledger:
        assert [each.text for each in ledger] == ["text 0", "\ud800 東京", "text 2"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_kill_while_lines_are_taken_over_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    old = tmp_path / "ledger.jsonl"
    path = old.with_suffix(".sqlite") if beside else old
    before = lines(old, [entry(n) for n in range(5)])

    def killed(self: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "replace", killed)
    process = multiprocessing.get_context("fork").Process(target=Ledger, args=(path,))
    process.start()
    process.join()
    monkeypatch.undo()
    assert process.exitcode == -signal.SIGKILL
    assert old.read_bytes() == before
    with Ledger(path) as ledger:
        assert len(ledger) == 5
    kept = old if beside else tmp_path / "ledger.jsonl.old"
    assert kept.read_bytes() == before
    assert len(files(tmp_path)) == 2


LINE = entry(1)
WRONG: dict[str, list[Any]] = {
    "key": ["zz", "", 7, None, "A" * 32, "é" * 32],
    "identity": [None, 1], "prompt": [[]], "label": [None, True], "text": [True, None, ["x"], 7],
    "finish": [5], "model": [None, {}], "draw": ["0", True, 1.5, None, -1, 10**400],
    "time": ["1", None, True, float("nan")], "usd": ["0.1", True, [], -1, float("inf"), 10**400],
    "input_tokens": [True, "5", 1.5, -3, 10**300], "output_tokens": [[], "x"],
}  # fmt: skip
WRONG_LINES = [
    json.dumps({**LINE.__dict__, name: value}).encode() + b"\n"
    for name, values in WRONG.items()
    for value in values
]
BROKEN = [b"{}\n", b"\xff\n", b"[1]\n", b'{"key": "zz"}\n', b"\n", b"1\n", b'"x"\n']


@pytest.mark.parametrize(
    "line", [*BROKEN, b"[" * 99999 + b"\n", *WRONG_LINES], ids=lambda line: line[:40]
)
def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    before = lines(path, [entry(0)], line)
    with pytest.raises(DataError, match=r"ledger\.jsonl:2 is no line of a ledger"):
        Ledger(path)
    assert path.read_bytes() == before
    assert files(tmp_path) == {"ledger.jsonl"}


def test_a_ledger_that_is_only_read_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.append(entry(0))
    before = path.read_bytes()
    with Ledger(path, writable=False) as ledger:
        assert [item.text for item in ledger] == ["text 0"]
        with pytest.raises(LlavaError, match="cannot write"):
            ledger.append(entry(1))
        assert files(tmp_path) == {"ledger.sqlite"}
    assert path.read_bytes() == before


def test_what_earlier_attempts_paid_for_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path / "one") as ledger:
        ledger.append(entry(0, text="one"))
    lines(tmp_path / "two", [entry(0, "another", text="two"), entry(3, text="three")])
    earlier = [tmp_path / "one", tmp_path / "two"]
    for _ in range(2):  # found again, but not read again
        with Ledger(tmp_path / "new", identity="a model", earlier=earlier) as ledger:
            assert [item.text for item in ledger] == ["one", "three"]
            assert ledger.spent == 1.0
        monkeypatch.setattr("llavakit_plugins.generation.requests.database.Source.blocks", None)
    monkeypatch.undo()
    with Ledger(tmp_path / "four") as ledger:
        ledger.append(entry(0), entry(4))
    with Ledger(
        tmp_path / "new", identity=None, earlier=[*earlier, tmp_path / "four"]
    ) as ledger:  # "two" again, as other chat models are asked for
        assert sorted(item.text for item in ledger) == ["one", "text 4", "three", "two"]
    assert texts(tmp_path / "one") == ["one"]


def test_a_file_that_was_removed_leaves_nothing_to_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path)
    first.append(entry(0))
    path.unlink()  # by a person, while its log of changes is beside it
    os.rename(tmp_path / "ledger.sqlite-wal", tmp_path / "log")
    first.close()
    os.rename(tmp_path / "log", tmp_path / "ledger.sqlite-wal")
    with Ledger(path) as ledger:
        assert len(ledger) == 0
