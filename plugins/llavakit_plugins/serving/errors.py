"""Errors as OpenAI's API gives them: a status, and a body with `message`, `type` and `code`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavakit import shown

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          429: "rate_limit_error"}  # fmt: skip


class RequestError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        # the official client chooses its exception by the status alone;
        # people and proxies read the type
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


class Gone(Exception):
    """The client went away: nobody waits for an answer."""


def on_one_line(text: str) -> str:
    r"""Return a stranger's text for a line of the log, which it can neither end nor begin."""
    return shown(text).replace("\n", r"\n").replace("\t", r"\t")
