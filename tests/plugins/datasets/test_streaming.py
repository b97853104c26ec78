"""Rows of JSON files of any size, against Python's own reader."""

from __future__ import annotations

import contextlib
import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from llavakit import DataError
from llavakit_plugins.datasets.json_stream import read_lines, read_member
from llavakit_plugins.datasets.streaming import StoredRows, count_rows, read_rows
from llavakit_plugins.generation.contexts import read_contexts
from llavakit_plugins.generation.curation.captions import read_captions

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
TABLES = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), min_size=1, max_size=5)
FAST = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def compare(path: Path, rows: list[Any], block: int) -> None:
    found = list(read_rows(path, block))
    assert [row.value for row in found] == rows
    data = path.read_bytes()
    stored = StoredRows(path)
    for row in found:
        assert json.loads(data[row.start : row.start + row.length]) == row.value
        stored.append(row)
    assert [stored[index] for index in range(len(stored))] == rows
    assert [copy.copy(stored)[index] for index in range(len(stored))] == rows


@FAST
@given(TABLES, st.sampled_from([None, 0, 2, 40]), st.booleans(), st.integers(1, 60))
@example([{"a": "é" * 40}, {"b": '\\"}{['}, {"c": "日本 🐱" * 9}], None, False, 1)
def test_a_list_is_read_as_json_reads_it(
    tmp_path: Path, rows: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    compare(path, rows, block)


@FAST
@given(TABLES, st.booleans())
def test_lines_are_read_as_json_reads_them(
    tmp_path: Path, rows: list[Any], ascii_only: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("\n\n".join(lines).encode())
    compare(path, rows, 1)


@FAST
@given(TABLES, st.data(), st.integers(1, 60))
def test_what_json_refuses_is_refused(
    tmp_path: Path, rows: list[Any], data: st.DataObject, block: int
) -> None:
    text = json.dumps(rows, indent=2)
    place = data.draw(st.integers(0, len(text) - 1))
    change = data.draw(st.sampled_from(["", *'{}[]",:1ax\\ \n']))
    broken = text[:place] + change + text[place + 1 :]
    path = tmp_path / "rows.json"
    path.write_text(broken, encoding="utf-8")
    try:
        expected = json.loads(broken)
    except json.JSONDecodeError:
        with pytest.raises(DataError, match=r"rows\.json(:\d+:\d+: not valid JSON| is not a list)"):
            list(read_rows(path, block))
    else:
        if isinstance(expected, list) and expected and all(isinstance(r, dict) for r in expected):
            compare(path, expected, block)


@pytest.mark.parametrize("block", [1, 10, 1 << 20])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"id": 1},\n  {"id": }]', "2:10: not valid JSON: Expecting value"),
        ('[{"id": 1}\n {"id": 2}]', "2:2: not valid JSON: Expecting ',' delimiter"),
        ('[{"id": 1},\n\n ]', "3:2: not valid JSON: Expecting value"),
        ('[{"id": "never ends', "1:9: not valid JSON: Unterminated string"),
        ('[{"id": 1}', "1:11: not valid JSON: Expecting ',' delimiter"),
        ('[{"id": 1}]\n[]', "2:1: not valid JSON: Extra data"),
        ('{"id": 1}\n{"id": 2}', "2:1: not valid JSON: Extra data; a file of JSON lines is named"),
        ("", "1:1: not valid JSON: Expecting value"),
    ],
)
def test_errors_stand_at_their_place(tmp_path: Path, text: str, place: str, block: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, block))
    assert f"{path}:{place}" in str(caught.value)


def test_errors_of_lines_stand_at_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": }\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2:8: not valid JSON: Expecting value"):
        list(read_rows(path))
    path.write_text('{"id": 1}\n[]\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the line is no JSON object"):
        list(read_rows(path))
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no samples"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_encodings(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    row = {"id": "é"}
    text = json.dumps(row, ensure_ascii=False)
    text = text if name.endswith("l") else f"[{text}]"
    path.write_text(text, encoding="utf-8-sig")  # as some editors save it
    compare(path, [row], 2)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte \d+\); convert it"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.ndjson"])
def test_marks_and_empty_lines_of_joined_files_do_no_harm(tmp_path: Path, name: str) -> None:
    """As `cat` joins files that an editor saved with a byte order mark."""
    mark = "\ufeff".encode()
    path = tmp_path / name
    path.write_bytes(mark + b'\n{"a": 1}\n' + mark + b'{"b": 2}\r\n\n' + mark)
    compare(path, [{"a": 1}, {"b": 2}], 1)
    assert [row.line for row in read_lines(path)] == [2, 3]


@pytest.mark.parametrize("text", ['[{"id": 1}]', '[\n {"id": 1},\n {"id": 2}\n]', "[]"])
def test_a_list_in_a_file_of_lines_gets_a_hint(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*name it \.json if it is one JSON list"):
        list(read_rows(tmp_path / "rows.jsonl"))


@FAST
@given(
    st.dictionaries(st.text(max_size=3), VALUES | st.lists(VALUES, max_size=4), max_size=4),
    st.text(max_size=3),
    st.sampled_from([None, 2]),
    st.integers(1, 60),
)
def test_a_list_within_an_object_is_read_as_json_reads_it(
    tmp_path: Path, table: dict[str, Any], name: str, indent: int | None, block: int
) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(table, indent=indent))
    for key in {name, *table}:
        expected = table.get(key)
        found = [row.value for row in read_member(path, key, block)]
        assert found == (expected if isinstance(expected, list) else [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "1:1: not valid JSON: Expecting '{'"),
        ("[]", "1:1: not valid JSON: Expecting '{'"),
        ('{"a" 1}', "1:6: not valid JSON: Expecting ':'"),
        ('{"b": 1 "a": []}', "1:9: not valid JSON: Expecting ','"),
        ('{"b": 1,}', "1:9: not valid JSON: Expecting property name"),
        ('{"b": 1', "1:8: not valid JSON: Expecting ','"),
        ('{"a": [1', "1:9: not valid JSON: Expecting ','"),
        ('{"b": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_object_is_told_at_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "coco.json").write_text(text)
    for block in (1, 1 << 20) if len(text) < 100 else (1 << 20,):
        with pytest.raises(DataError) as caught:
            list(read_member(tmp_path / "coco.json", "a", block))
        assert sentence in str(caught.value)


@FAST
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from("ln"))
def test_any_bytes_are_rows_or_a_sentence(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / f"rows.json{kind if kind == 'l' else ''}"
    path.write_bytes(content)
    for read in (read_rows, read_captions, read_contexts):
        with contextlib.suppress(DataError):
            list(read(path))
    with contextlib.suppress(DataError):
        list(read_member(path, "a"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_doubled_key_is_told_with_its_row(tmp_path: Path, name: str) -> None:
    rows = ['{"a": 1}', '{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', '{"e": 1, "e": 1}']
    path = tmp_path / name
    path.write_text("\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]")
    assert [row.doubled for row in read_rows(path, 7)] == [None, "c", "e"]


def test_a_file_larger_than_the_memory_given_to_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"id": str(number), "conversations": ["x" * 500]} for number in range(8000)]
    path.write_text(json.dumps(rows, indent=1))
    size = path.stat().st_size
    del rows
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, 1 << 14))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == count_rows(path, "conversations") == 8000
    assert peak < size / 20


def test_a_file_that_changes_while_it_is_in_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "a"}, {"id": "b"}]))
    stored = StoredRows(path)
    for row in read_rows(path):
        stored.append(row)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"row 2 of .* must stay as it is"):
        stored[1]


def test_only_keys_count_as_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"conversations": 'a "conversations": "x"'}, {"other": 1, "conversations": []}]
    path.write_text(json.dumps(rows))
    assert count_rows(path, "conversations") == 2
