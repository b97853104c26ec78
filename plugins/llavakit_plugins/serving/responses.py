"""What a client gets: chat completions whole and in pieces, with OpenAI's names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from llavakit_plugins.serving.writing import Piece

DONE = b"data: [DONE]\n\n"


@dataclass
class Usage:
    """How many tokens a request took."""

    prompt: int
    completion: int = 0

    def table(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Completion:
    """One chat completion: its name and what all its pieces share."""

    model: str
    spell: Callable[[int], str]  #: Returns the text of one token.
    id: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage, logprobs: bool) -> bytes:
        """Return the body of an answer that is not streamed; one list of pieces a choice."""
        found = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(piece.text for piece in pieces),
                    "refusal": None,
                },
                "logprobs": self._logprobs(pieces) if logprobs else None,
                "finish_reason": pieces[-1].finish,
            }
            for index, pieces in enumerate(choices)
        ]
        return encode(self._table("chat.completion", found) | {"usage": usage.table()})

    def begin(self, index: int, more: Mapping[str, Any]) -> bytes:
        """Return the first event of a choice: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, more)

    def event(
        self, index: int, pieces: Sequence[Piece], more: Mapping[str, Any], logprobs: bool
    ) -> bytes:
        """Return the events of some pieces: none where they have no text and end nothing."""
        text = "".join(piece.text for piece in pieces)
        found = self._logprobs(pieces) if logprobs else None
        events = self._chunk(index, {"content": text}, more, found) if text or found else b""
        if (finish := pieces[-1].finish) is not None:
            events += self._chunk(index, {}, more, finish=finish)
        return events

    def end(self, usage: Usage) -> bytes:
        """Return the event that tells what a request took."""
        return _event(self._table("chat.completion.chunk", []) | {"usage": usage.table()})

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        more: Mapping[str, Any],
        logprobs: Any = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event(self._table("chat.completion.chunk", [choice]) | dict(more))

    def _table(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        def shown(token: int, logprob: float) -> dict[str, Any]:
            text = self.spell(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            shown(piece.token.id, piece.token.logprob)
            | {"top_logprobs": [shown(*pair) for pair in piece.token.top]}
            for piece in pieces
            if piece.token.logprob is not None
        ]
        return {"content": content, "refusal": None}


def encode(table: Mapping[str, Any]) -> bytes:
    """Return a table as JSON."""
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


def _event(table: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(table) + b"\n\n"


def error_event(body: Mapping[str, Any]) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    return _event(body)
