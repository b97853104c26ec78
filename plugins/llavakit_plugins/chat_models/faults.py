"""The results of one request to a service other than a reply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llavakit import ChatError, ReplyError


class Fault(Exception):
    """One attempt that failed and may be made again."""

    def __init__(self, message: str, pause: float | None = None, busy: bool = False) -> None:
        super().__init__(message)
        self.pause = pause
        """Seconds that the service asks to wait."""
        self.busy = busy


@dataclass(frozen=True)
class Complaint:
    """An error message of a service."""

    code: str
    said: str
    """In its own words."""
    param: str = ""
    """Which field it is about, where it says so."""

    @property
    def filtered(self) -> bool:
        """Whether the error comes from a content filter."""
        return "content_filter" in self.code or "content_policy" in self.code


class Withheld(ReplyError):
    """The service's content filter withholds the answer."""


class Refused(ReplyError):
    """The service refuses this one request in its present form."""

    def __init__(self, message: str, complaint: Complaint) -> None:
        super().__init__(message, lasting=True)
        self.complaint = complaint


class EndsJob(ReplyError):
    """What is wrong with this request would be with every other: the key, the model or the credit.

    A line of a batch that other lines contradict may pass all the same.
    """

    def __init__(self, message: str, status: int, complaint: Complaint) -> None:
        super().__init__(message)
        self.status, self.complaint = status, complaint


class Absent(ChatError):
    """The service does not know a path, or what an id names."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said
        """The service's own words."""


_SAYING = (
    "message",
    "msg",
    "detail",
    "error_description",
    "description",
    "reason",
    "error",
    "errors",
)
_DEPTH = 4


def read_complaint(body: object, otherwise: str = "no reason given") -> Complaint:
    """Return what an error's body says: a table of any usual form, a list of them, or text."""
    tables = list(_tables(body, _DEPTH))
    codes = [table[name] for name in ("code", "type") for table in tables if _plain(table, name)]
    params = [table["param"] for table in tables if _plain(table, "param")]
    params += [loc[-1] for table in tables if isinstance(loc := table.get("loc"), list) and loc]
    said = " ".join(_said(body, _DEPTH).split())
    code, param = (str(found[0]) if found else "" for found in (codes, params))
    return Complaint(code, said or otherwise, param)


def _plain(table: Mapping[str, object], name: str) -> bool:
    return isinstance(table.get(name), str | int) and table[name] != ""


def _tables(body: object, depth: int) -> Iterator[Mapping[str, object]]:
    """Yield a table and those within it that say more."""
    if isinstance(body, Mapping):
        yield body
    items = [body.get(name) for name in _SAYING] if isinstance(body, Mapping) else body
    if isinstance(items, list) and depth:
        for item in items:
            yield from _tables(item, depth - 1)


def _said(body: object, depth: int) -> str:
    """Return the words in a body: of a table the field that says it, of a list all."""
    if isinstance(body, str):
        return body
    if isinstance(body, Mapping) and depth:
        return next((text for name in _SAYING if (text := _said(body.get(name), depth - 1))), "")
    if isinstance(body, list) and depth:
        return "; ".join(text for item in body if (text := _said(item, depth - 1)))
    return "" if body is None or isinstance(body, Mapping | list) else str(body)
