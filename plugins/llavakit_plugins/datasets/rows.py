"""Reads files of JSON rows and joins them by id; errors name broken lines and repeated ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llavakit import DataError, and_more
from llavakit.contracts.data import is_cut
from llavakit_plugins.datasets.text_files import read_text

Row = Mapping[str, Any]
_NAMED = 5  # ids that a message lists


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises DataError where it cannot be read, with line and column where it is broken, and where an
    object has one key twice: which of the two counts, nobody could say.
    """
    return parse_json(read_text(path), path)


def read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the location (`file:line`) and the object of every line of a JSON Lines file.

    Raises DataError, which names the line, for a line that is no JSON object.
    """
    # not `splitlines`, which also splits at U+2028 and others that JSON allows within a text
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            row = parse_json(line, path, number)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a row is a JSON object, got {line.strip():.60}")
            yield f"{path}:{number}", row


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """Return location and object of every row of a file: a JSON list, or one object per line."""
    text = read_text(path).lstrip()
    if not text.startswith("["):
        return list(read_lines(path))
    rows = parse_json(text, path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is no JSON object; fix or remove it")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def first_line(path: Path) -> str:
    """Return the first line of a file that holds something; nothing where it is empty."""
    return read_text(path).lstrip().partition("\n")[0]


def text_of(row: Row, key: str, where: str) -> str:
    """Return the text under `key`; a number counts as text. Raises DataError where it is not."""
    value = row.get(key)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"{where}: needs `{key}` (text), got {value!r:.60}; add or fix it")
    if is_cut(str(value)):
        raise DataError(f"{where}: `{key}` ends within a character (half an emoji); fix it")
    return str(value)


def id_of(row: Row, where: str, keys: Sequence[str] = ("question_id", "id")) -> str | int:
    """Return the row's id, a number as a number."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return value
    raise DataError(f"{where}: needs `{keys[0]}` (a number or text); add it")


def by_id(rows: Sequence[tuple[str, Row]], path: Path) -> dict[str, tuple[str, Row]]:
    """Return rows by their id as text. Raises DataError naming those that are doubled."""
    found = {str(id_of(row, where)): (where, row) for where, row in rows}
    if len(found) < len(rows):
        raise DataError(_doubled([str(id_of(row, where)) for where, row in rows], f"{path}"))
    return found


def listed(ids: Sequence[object]) -> str:
    """Return ids as a message names them: the first few, and how many more."""
    return and_more(ids, _NAMED, "`{}`".format)


def parse_json(text: str, path: Path | str, line: int | None = None) -> Any:
    """Return what a JSON text holds; `path`, and perhaps a line, say in errors what it is.

    Raises DataError as `read_json` does.
    """
    where = f"{path}:{line}" if line else f"{path}"
    try:
        found = json.loads(text, object_pairs_hook=partial(_object, where))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line or error.lineno}:{error.colno}: not valid JSON: {error.msg}; fix or "
            "remove it"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to read; fix the file") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise DataError(f"{where} holds a number that is too long to read; fix it") from error
    if "\\u" in text and is_cut(json.dumps(found, ensure_ascii=False)):
        raise DataError(f"{where}: a text ends within a character (half an emoji); fix it")
    return found


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError(_doubled([key for key, _ in pairs], where))
    return found


def _doubled(names: Sequence[str], where: str) -> str:
    twice = [name for name, count in Counter(names).items() if count > 1]
    are = "is" if len(twice) == 1 else "are"
    return f"{where}: {listed(twice)} {are} there more than once; keep one of each"
