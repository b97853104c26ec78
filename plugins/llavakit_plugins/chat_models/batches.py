"""OpenAI's batch service: a file of requests is handed in, polled, and collected within a day."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from llavakit import ChatError, Reply, ReplyError
from llavakit_plugins.chat_models.faults import Fault
from llavakit_plugins.chat_models.pacing import backoff, retry_after
from llavakit_plugins.chat_models.service import Service
from llavakit_plugins.generation.requests.batches import BatchService, BatchState
from llavakit_plugins.generation.requests.ledger import Request

_ENDED = ("completed", "failed", "expired", "cancelled")
_MARK = "llavakit"
T = TypeVar("T")


class OpenAIBatches(BatchService):
    """The batches of one account."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.size = service.options.batch_size
        self.poll_seconds = service.options.poll_seconds

    async def submit(self, mark: str, requests: Mapping[str, Request]) -> str:
        lines = [
            json.dumps(
                {
                    "custom_id": key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": self._service.body(request.messages, request.draw),
                }
            )
            for key, request in requests.items()
        ]
        content = ("\n".join(lines) + "\n").encode()
        client = self._service.client()
        file = await self._call(
            lambda: client.files.create(file=("requests.jsonl", content), purpose="batch")
        )
        batch = await self._call(
            lambda: client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_MARK: mark},
            )
        )
        return str(batch.id)

    async def find(self, mark: str) -> list[str]:
        async def search() -> list[str]:
            found = []
            async for batch in self._service.client().batches.list(limit=100):
                if (batch.metadata or {}).get(_MARK) == mark:
                    found.append(batch.id)
            return found[::-1]

        return await self._call(search)

    async def state(self, batch: str) -> BatchState:
        found = await self._call(lambda: self._service.client().batches.retrieve(batch))
        counts = found.request_counts
        complaints = [item.message or "" for item in (found.errors and found.errors.data) or []]
        return BatchState(
            done=found.status in _ENDED,
            answered=counts.completed + counts.failed if counts else 0,
            total=counts.total if counts else 0,
            status=found.status,
            complaint=self._service.clean("; ".join(complaints)),
        )

    async def collect(self, batch: str) -> AsyncIterator[tuple[str, Reply | str]]:
        client = self._service.client()
        found = await self._call(lambda: client.batches.retrieve(batch))
        for file in (found.output_file_id, found.error_file_id):
            if file is None:
                continue
            name: str = file
            content = await self._call(lambda name=name: client.files.content(name))  # type: ignore[misc]
            for line in content.content.splitlines():
                if line.strip():
                    yield self._parse(line)

    def _parse(self, line: bytes) -> tuple[str, Reply | str]:
        try:
            row: dict[str, Any] = json.loads(line.decode("utf-8"))
            key = str(row["custom_id"])
            response = row.get("response") or {}
            body = response.get("body") or {}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ChatError(
                f"the batch service gives a line that cannot be read: {error}"
            ) from None
        if response.get("status_code") == 200:
            try:
                return key, self._service.reply_of(body)
            except Fault as unreadable:
                return key, str(unreadable)
        fault = body.get("error") or row.get("error") or {}
        code, message = fault.get("code") or "", fault.get("message") or "no reason given"
        if "content_filter" in code or "content_policy" in code:
            return key, Reply("", "content_filter", self._service.options.model, 0, 0, 0.0)
        return key, self._service.clean(f"{code} {message}".strip())

    async def _call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what a call to the service gives, after pauses where it fails for a while."""
        import openai

        options = self._service.options
        failures = 0
        while True:
            pause: float | None = None
            try:
                async with asyncio.timeout(options.timeout):
                    return await ask()
            except (TimeoutError, openai.APITimeoutError):
                said = f"no answer within {options.timeout:g} s"
            except openai.APIStatusError as error:
                try:
                    self._service.explain(error)
                except (Fault, ReplyError) as fault:
                    if isinstance(fault, ReplyError):
                        raise ChatError(str(fault)) from None
                    said, pause = str(fault), retry_after(error.response.headers)
                else:
                    raise await self._service.fatal(error) from None
            except openai.APIConnectionError as error:
                said = self._service.clean(f"the connection failed: {error.__cause__ or error}")
            failures += 1
            if failures > options.retries:
                raise ChatError(
                    f"the batch service at {options.base_url} does not answer after {failures} "
                    f"tries: {said}; run again later with --resume"
                )
            await asyncio.sleep(backoff(failures, options.backoff) if pause is None else pause)
