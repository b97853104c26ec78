"""Batches at a service that lacks what was asked of it: no batch API, batch, file, model or key."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.plugins.chat_server import Handler, Service, serve, user_text

from llavakit import ChatError, Message
from llavakit_plugins.chat_models.openai import OpenAI
from llavakit_plugins.chat_models.options import OpenAIOptions
from llavakit_plugins.generation.requests.ledger import Ledger, Request
from llavakit_plugins.generation.requests.send import Tally
from llavakit_plugins.generation.requests.send_all import send_all

Line = dict[str, Any]


def job(service: Service, folder: Path, count: int = 4, **options: Any) -> Tally:
    """Run a job of so many requests, or go on with it."""
    stated = {"model": "gpt-4o", "base_url": service.url, "backoff": 0.01, "poll_seconds": 0.02}
    chat = OpenAI(OpenAIOptions(**{**stated, "retries": 1, "batch": True, **options}))
    todo = [Request((Message("user", f"question {number}"),)) for number in range(count)]
    with Ledger(folder / "ledger") as ledger:
        return send_all(chat, lambda: todo, ledger)


# -- no batch API ----------------------------------------------------------------------------------


class NoBatches(Handler):
    """Answers chats alone, and all other paths in one way."""

    other: ClassVar[Callable[[Handler], None]]
    missing: ClassVar[tuple[str, ...]] = ("/files", "/batches")

    def _missing(self) -> bool:
        path = self.path.partition("?")[0]
        if not path.endswith(self.missing):
            return False
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).other(self)
        return True

    def do_POST(self) -> None:
        if not self._missing():
            super().do_POST()

    def do_GET(self) -> None:
        if not self._missing():
            super().do_GET()


@pytest.mark.parametrize("missing", [("/files", "/batches"), ("/batches",)], ids=str)
@pytest.mark.parametrize(
    "other",
    [
        lambda h: h.json(404, {"detail": "Not Found"}),
        lambda h: h.send(404, b"404 page not found", "text/plain"),
        lambda h: h.json(405, {"detail": "Method Not Allowed"}),
        lambda h: h.fail(501, "Not Implemented"),
        lambda h: h.json(200, {"error": "Unexpected endpoint"}),
        lambda h: h.send(200, b"<!doctype html>", "text/html"),
    ],
    ids=["404", "404 in words", "405", "501", "200 with an error", "200 with a page"],
)
def test_a_service_without_batches_is_told_as_one(
    tmp_path: Path, other: Callable[[Handler], None], missing: tuple[str, ...]
) -> None:
    handler = type("Now", (NoBatches,), {"other": staticmethod(other), "missing": missing})
    with serve(handler=handler) as service:
        for _ in range(2):  # also when the job is resumed
            with pytest.raises(ChatError, match=r"no batch.*leave out `batch = true`") as told:
                job(service, tmp_path)
            assert "has no model" not in str(told.value)


def test_a_service_without_batches_is_named_by_its_address(tmp_path: Path) -> None:
    handler = type("Now", (NoBatches,), {"other": lambda h: h.json(404, {"detail": "Not Found"})})
    with serve(handler=handler) as service:
        with pytest.raises(ChatError, match=f"{service.url} has no batch service: Not Found"):
            job(service, tmp_path)
        assert job(service, tmp_path, batch=False).answered == 4


# -- a batch or a file that is gone ----------------------------------------------------------------


class Losing(Handler):
    """Loses the first batch, or its files: 404 whenever that is asked for."""

    lost: ClassVar[str]
    times: ClassVar[int]
    """How often; afterwards it is there."""

    def do_GET(self) -> None:
        batches = self.service.batches
        first = batches.get("batch-0", {})
        files = (f"{first.get('output_file_id')}/content", f"{first.get('error_file_id')}/content")
        of_lost = ("batch-0",) if self.lost == "batch" else files
        if self.path.endswith(of_lost) and type(self).times > 0:
            type(self).times -= 1
            self.fail(404, f"No such {self.lost} object")
        else:
            super().do_GET()

    def work_on(self, batch: dict[str, Any]) -> None:
        super().work_on(batch)
        if batch["status"] == "completed":
            batch["error_file_id"] = f"errors-of-{batch['id']}"
            self.service.files[batch["error_file_id"]] = b""


@pytest.mark.parametrize("lost", ["batch", "File"])
def test_what_a_service_has_lost_is_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    with serve(handler=type("Now", (Losing,), {"lost": lost, "times": 1000})) as service:
        tally = job(service, tmp_path)
        assert (tally.answered, len(tally.unanswered), tally.refused) == (0, 4, set())
        (warning,) = [row for row in caplog.records if row.levelno == logging.WARNING]
        assert f"batch-0: No such {lost} object" in warning.message
        assert service.url in warning.message
        assert job(service, tmp_path).answered == 4
        assert len(service.batches) == 2
        assert job(service, tmp_path).answered == 0  # nothing is left, and nothing is asked
        assert len(service.batches) == 2
    _, *collected = map(json.loads, (tmp_path / "batches.jsonl").read_text().splitlines())
    assert collected == [{"collected": "batch-0"}, {"collected": "batch-1"}]


@pytest.mark.parametrize("lost", ["batch", "File"])
def test_what_comes_late_is_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    with serve(handler=type("Now", (Losing,), {"lost": lost, "times": 2})) as service:
        assert job(service, tmp_path).answered == 4
        assert len(service.batches) == 1
    assert not [row for row in caplog.records if row.levelno == logging.WARNING]


def test_of_a_lost_batch_the_other_batches_are_kept(tmp_path: Path) -> None:
    with serve(handler=type("Now", (Losing,), {"lost": "File", "times": 1000})) as service:
        tally = job(service, tmp_path, count=6, batch_size=2)
        assert (tally.answered, len(tally.unanswered)) == (4, 2)
        assert job(service, tmp_path, count=6, batch_size=2).answered == 2
        asked = Counter(user_text(body) for body in service.asked)
    assert sorted(asked.values()) == [1, 1, 1, 1, 2, 2]


# -- lines that would be the same for every request ------------------------------------------------


def failed(status: int, code: str, message: str) -> Line:
    body = {"error": {"code": code, "message": message}}
    return {"response": {"status_code": status, "body": body}}


KEY = failed(401, "invalid_api_key", "bad key")
MODEL = failed(404, "model_not_found", "no such model")
PATH = failed(404, "", "Not Found")
CREDIT: Line = {"response": None, "error": {"code": "insufficient_quota", "message": "empty"}}
LATE: Line = {"response": None, "error": {"code": "batch_expired", "message": "too late"}}


class Failing(Handler):
    """Puts lines in place of the first ones of each batch, while `broken`."""

    lines: ClassVar[list[Line]]
    broken: ClassVar[bool] = True

    def work_on(self, batch: dict[str, Any]) -> None:
        super().work_on(batch)
        name = batch.get("output_file_id")
        if name is None or batch["looks"] != 2 or not self.broken:
            return
        rows = [json.loads(line) for line in self.service.files[name].splitlines()]
        for row, line in zip(rows, self.lines, strict=False):
            row |= line
        self.service.files[name] = "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize(
    ("lines", "model", "said"),
    [
        ([KEY] * 4, "gpt-4o", "does not take the key in environment variable OPENAI_API_KEY: bad"),
        ([MODEL] * 4, "gpt-4oo", r"no model `gpt-4oo`: no such model; did you mean `gpt-4o`\?"),
        ([PATH] * 4, "gpt-4o", r"lists the model `gpt-4o` but .*: Not Found; check `base_url`"),
        ([CREDIT] * 4, "gpt-4o", "has no credit left: empty"),
        ([KEY, LATE, LATE, KEY], "gpt-4o", "does not take the key"),
    ],
    ids=["key", "model", "path", "credit", "key and late"],
)
def test_a_batch_without_a_reply_ends_the_job_as_one_request_does(
    tmp_path: Path, lines: list[Line], model: str, said: str
) -> None:
    handler: Any = type("Now", (Failing,), {"lines": lines})
    with serve(handler=handler) as service:
        for batches in (1, 2):  # a resume collects the earlier batch and sends what it lacks
            with pytest.raises(ChatError, match=said):
                job(service, tmp_path, model=model)
            assert len(service.batches) == batches


def test_an_earlier_batch_without_a_reply_does_not_block_a_job_that_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler: Any = type("Now", (Failing,), {"lines": [KEY] * 4})
    with serve(handler=handler) as service:
        with pytest.raises(ChatError, match="does not take the key"):
            job(service, tmp_path)
        with pytest.MonkeyPatch.context() as mended:
            mended.setattr(Failing, "broken", False)
            assert job(service, tmp_path).answered == 4
            assert job(service, tmp_path).answered == 0
        assert len(service.batches) == 2
    (warning,) = [row for row in caplog.records if row.levelno == logging.WARNING]
    assert "batch-0 has no reply: " in warning.message
    assert "does not take the key" in warning.message


@pytest.mark.parametrize("line", [KEY, MODEL, CREDIT], ids=["key", "model", "credit"])
def test_lines_that_others_contradict_are_asked_again(tmp_path: Path, line: Line) -> None:
    handler: Any = type("Now", (Failing,), {"lines": [line] * 3})
    with serve(handler=handler) as service:
        tally = job(service, tmp_path)
        assert (tally.answered, len(tally.unanswered), tally.refused) == (1, 3, set())


def test_all_lines_late_are_asked_again(tmp_path: Path) -> None:
    handler: Any = type("Now", (Failing,), {"lines": [LATE] * 4})
    with serve(handler=handler) as service:
        tally = job(service, tmp_path)
        assert (tally.answered, len(tally.unanswered), tally.refused) == (0, 4, set())


# -- a chat's path ---------------------------------------------------------------------------------


def test_a_model_that_is_listed_is_not_called_unknown(service: Service, tmp_path: Path) -> None:
    service.otherwise = lambda h, b: h.json(404, {"detail": "Not Found"})
    with pytest.raises(ChatError, match=r"lists the model `gpt-4o` but .*check `base_url`") as told:
        job(service, tmp_path, batch=False)
    assert "did you mean" not in str(told.value)
