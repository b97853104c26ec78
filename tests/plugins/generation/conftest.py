"""The chat service that the tests of this folder ask, and its key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.plugins.chat_server import KEY, Service, serve, user_text


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        running.otherwise = lambda h, b: h.answer(f"Re: {user_text(b)}")
        yield running
