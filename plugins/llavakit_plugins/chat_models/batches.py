"""OpenAI's batch service: a file of requests is submitted, polled, and collected within a day."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, TypeVar
from urllib.parse import quote

from llavakit import ChatError, Reply, ReplyError, explain_write
from llavakit_plugins.chat_models.faults import (
    Absent,
    EndsJob,
    Fault,
    Refused,
    Withheld,
    read_complaint,
)
from llavakit_plugins.chat_models.pacing import backoff
from llavakit_plugins.chat_models.service import Service
from llavakit_plugins.generation.requests.batches import (
    BatchService,
    BatchState,
    Draft,
    SendAgain,
)
from llavakit_plugins.generation.requests.ledger import Request

_ENDED = ("completed", "failed", "expired", "cancelled")
_MARK = "llavakit"
_ABSENT = (404, 410)  # neither a path nor what an id names
_NO_PATH = (405, 501)
_SURE = 3  # times that something is not there before it is believed: what is new may come late
_OR_NONE = "run again with --resume; if that stays so it has no batches: leave out `batch = true`"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class _File(Draft):
    """The file of a batch, on the disk: a line for each request."""

    def __init__(self, service: Service) -> None:
        self._service = service
        with explain_write(Path(gettempdir())):
            self.file = TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._bytes = self._requests = 0

    def add(self, key: str, request: Request) -> bool:
        options = self._service.options
        row = {
            "custom_id": key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": self._service.body(request.messages, request.draw),
        }
        line = json.dumps(row).encode() + b"\n"
        if len(line) > options.batch_bytes:
            raise ReplyError(
                f"a request of {len(line):,} bytes is larger than a batch's file may be "
                f"(`batch_bytes` = {options.batch_bytes:,})",
                lasting=True,
            )
        full = self._requests >= options.batch_size
        if full or self._bytes + len(line) > options.batch_bytes:
            return False
        with explain_write(Path(gettempdir())):
            self.file.write(line)
            self.file.flush()
        self._bytes += len(line)
        self._requests += 1
        return True

    def __len__(self) -> int:
        return self._requests

    def close(self) -> None:
        self.file.close()


class OpenAIBatches(BatchService):
    """The batches of one account."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.poll_seconds = service.options.poll_seconds
        self.at_once = service.options.batches_at_once
        self._submitted: set[str] = set()
        self._gone: set[str] = set()

    def draft(self) -> Draft:
        return _File(self._service)

    async def submit(self, mark: str, draft: Draft) -> str:
        assert isinstance(draft, _File)
        client = self._service.client()

        async def upload() -> Any:
            draft.file.seek(0)
            # sent from the disk, piece by piece
            return await client.files.create(file=("requests.jsonl", draft.file), purpose="batch")

        file = await self._call(upload)
        table = {
            # a page of HTML, which some services give for every path, is no file
            "input_file_id": _id(getattr(file, "id", None)),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            # after a crash the batch is found again by this mark,
            # although its id was never written down
            "metadata": {_MARK: mark},
        }
        answer = await self._found(lambda: client.post("/batches", cast_to=object, body=table))
        batch = _id(_table(answer).get("id"))
        self._submitted.add(batch)
        return batch

    async def find(self, mark: str) -> list[str]:
        client = self._service.client()
        found: list[str] = []
        seen: set[str] = set()
        query: dict[str, Any] = {"limit": 100}
        while True:
            page = _table(
                await self._call(
                    lambda: client.get("/batches", cast_to=object, options={"params": query})  # noqa: B023
                )
            )
            rows = page.get("data")
            rows = rows if isinstance(rows, list) else []
            batches = [row for row in rows if isinstance(row, dict)]
            ids = [_id(batch.get("id")) for batch in batches]
            for name, batch in zip(ids, batches, strict=True):
                marks = batch.get("metadata")
                if isinstance(marks, dict) and marks.get(_MARK) == mark and name not in seen:
                    found.append(name)
            # a service that ignores `after` would send the same page for ever
            if page.get("has_more") is not True or not set(ids) - seen:
                return found[::-1]
            seen |= set(ids)
            query = {"limit": 100, "after": ids[-1]}

    async def state(self, batch: str) -> BatchState:
        found = await self._retrieve(batch)
        if found is None:
            return BatchState(done=True, answered=0, total=0, status="gone")
        counts = found.get("request_counts")
        numbers = counts if isinstance(counts, dict) else {}
        completed, failed, total = (
            number if type(number := numbers.get(name)) is int else 0
            for name in ("completed", "failed", "total")
        )
        status = found.get("status")
        if not isinstance(status, str):
            raise ChatError(f"the batch service gives batch {batch} no status; run again later")
        errors = found.get("errors")
        return BatchState(
            done=status in _ENDED,
            answered=completed + failed,
            total=total,
            status=self._service.clean(status),
            complaint=self._service.clean(
                read_complaint(errors.get("data") if isinstance(errors, dict) else errors).said
            ),
        )

    async def collect(self, batch: str) -> AsyncIterator[tuple[str, Reply | ReplyError]]:
        client = self._service.client()
        found = await self._retrieve(batch)
        if found is None:
            return
        unread, answered = 0, False
        absent: Absent | None = None
        end: EndsJob | None = None
        for name in (found.get("output_file_id"), found.get("error_file_id")):
            if not isinstance(name, str) or not name:  # some services give "" for none
                continue
            try:
                content = await self._found(lambda name=name: client.files.content(name))  # type: ignore[misc]
            except Absent as error:
                absent = error
                continue
            for line in BytesIO(content.content):
                if line.strip():
                    try:
                        key, reply = self._parse(line)
                    except Fault as fault:
                        unread += 1
                        reason = str(fault)
                        continue
                    answered |= isinstance(reply, Reply)
                    end = reply if isinstance(reply, EndsJob) else end
                    yield key, reply
        if unread:
            _log.warning(
                "batch %s has %d lines that cannot be read; what they were to answer is asked for "
                "again. The last: %s", batch, unread, reason,
            )  # fmt: skip
        if absent is not None:
            self._say_gone("all replies of batch", batch, absent)
        elif end is not None and not answered:
            fatal = await self._service.fatal(end.status, end.complaint)
            if batch in self._submitted:
                raise fatal
            # of an earlier run: what was wrong may be right by now, so it is only said
            _log.warning("batch %s has no reply: %s. Its requests are asked again", batch, fatal)

    async def _retrieve(self, batch: str) -> dict[str, Any] | None:
        """Return what the service says of a batch; None where it does not know it any more."""
        if batch in self._gone:
            return None
        client = self._service.client()
        path = f"/batches/{quote(batch, safe='')}"
        try:
            return _table(await self._found(lambda: client.get(path, cast_to=object)))
        except Absent as absent:
            self._gone.add(batch)
            self._say_gone("batch", batch, absent)
            return None

    def _say_gone(self, what: str, batch: str, absent: Absent) -> None:
        _log.warning(
            "%s no longer has %s %s: %s; what has no reply is asked for again",
            *(self._service.where, what, self._service.clean(batch), absent.said),
        )

    def _parse(self, line: bytes) -> tuple[str, Reply | ReplyError]:
        """Return a request's key with its reply, or with the error that explains why there is none.

        Raises Fault if the line does not say which request it belongs to.
        """
        row = self._service.table(line)
        # checked, as it becomes a key of the ledger: services return what they like
        key = row.get("custom_id") if isinstance(row, dict) else None
        if not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{32}", key):
            raise Fault(self._service.clean(f"it names no request of ours: {row!r}"))
        response = row.get("response")
        response = response if isinstance(response, dict) else {"body": response}
        body, status = response.get("body"), response.get("status_code")
        if str(status) == "200":
            try:
                return key, self._service.reply_of(body)
            except Fault as unreadable:
                return key, ReplyError(str(unreadable))
        of_body = body.get("error") or body if isinstance(body, dict) else body
        complaint = read_complaint(of_body or row.get("error"))
        status = status if type(status) is int else 500
        verdict = self._service.judge(status, complaint)
        if isinstance(verdict, Withheld) or complaint.filtered:
            return key, Reply("", "content_filter", self._service.options.model, 0, 0, 0.0)
        said = self._service.clean(f"{complaint.code} {complaint.said}".strip())
        if isinstance(verdict, Refused) and self._service.learn(complaint):
            return key, SendAgain(said)
        if verdict is None:
            return key, EndsJob(said, status, complaint)
        return key, ReplyError(said, lasting=isinstance(verdict, Refused))

    async def _found(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call that names something by its id.

        Raises Absent where it is not there, after some tries: to take a batch for lost too soon
        would be to pay for it twice.
        """
        for failures in range(1, _SURE):
            with suppress(Absent):
                return await self._call(ask)
            await asyncio.sleep(backoff(failures, self._service.options.backoff))
        return await self._call(ask)

    async def _call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call to the service; try again, after pauses, while it fails.

        Raises ChatError: Absent where the path is not there.
        """
        import openai

        service, options = self._service, self._service.options
        failures = 0

        async def known() -> T:
            try:
                return await ask()
            except openai.APIStatusError as error:
                status = error.status_code
                complaint = read_complaint(error.body, f"status {status}")
                missing = status in (*_ABSENT, *_NO_PATH) and complaint.code != "model_not_found"
                if not missing:
                    raise
                said = service.clean(complaint.said)
                told = (
                    f"{service.where} has no batch service: {said}; leave out `batch = true`, "
                    "or check `base_url`"
                )
                raise (Absent(told, said) if status in _ABSENT else ChatError(told)) from None

        while True:
            try:
                return await service.call(known)
            except ReplyError as error:
                raise ChatError(str(error)) from None
            except Fault as fault:
                failures += 1
                pause = backoff(failures, options.backoff) if fault.pause is None else fault.pause
                if failures > options.retries or pause > options.patience:
                    raise ChatError(
                        f"the batch service at {service.where} does not "
                        f"answer after {failures} tries: {fault}; run again later with --resume"
                    ) from None
                await asyncio.sleep(pause)


def _table(value: object) -> dict[str, Any]:
    """Return an answer that is a JSON table. Raises ChatError for any other answer."""
    if not isinstance(value, dict):
        raise ChatError(f"the batch service gives no table but {type(value).__name__}; {_OR_NONE}")
    return value


def _id(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ChatError(f"the batch service gives a batch or file no id; {_OR_NONE}")
    return value
