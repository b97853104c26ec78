"""The service that the chat models of this folder ask, and its key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.plugins.chat_server import KEY, Service, serve


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        yield running
