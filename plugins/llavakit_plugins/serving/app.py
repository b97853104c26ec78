"""The routes of the server, and what every answer goes through."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from importlib import resources
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llavakit_plugins.serving import metrics as prometheus
from llavakit_plugins.serving.chat import Chat
from llavakit_plugins.serving.errors import Gone, RequestError, on_one_line
from llavakit_plugins.serving.guard import Guard
from llavakit_plugins.serving.http import Answer, Endpoint
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.metrics import Metrics
from llavakit_plugins.serving.responses import encode
from llavakit_plugins.serving.scheduler import Scheduler

_log = logging.getLogger(__name__)
_access = logging.getLogger("llavakit.serving.access")

# nothing from elsewhere, nothing inline: what a model writes can never run
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE = {
    "x-content-type-options": "nosniff",
    # the address of the page may hold the name of a machine inside a network
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
       for name in ("chat", "heat", "service", "store")},
}  # fmt: skip


class Asgi:
    """An endpoint as Starlette routes to it."""

    def __init__(self, endpoint: Endpoint, seconds: float) -> None:
        self._endpoint, self._seconds = endpoint, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, Answer(send, self._seconds))


def make_app(
    *,
    chat: Chat,
    heatmap: Endpoint | None,
    scheduler: Scheduler,
    guard: Guard,
    name: str,
    longest: int,
    limits: Limits,
    metrics: Metrics,
    stopping: Callable[[], bool],
) -> ASGIApp:
    """Return the whole server as an ASGI application."""
    created = int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "llavakit",
             "max_model_len": longest, "heatmaps": heatmap is not None}  # fmt: skip

    def table(of: Callable[[], dict[str, Any]]) -> Endpoint:
        async def endpoint(scope: Scope, receive: Receive, answer: Answer) -> None:
            await answer.whole(200, encode(of()))

        return endpoint

    async def one_model(scope: Scope, receive: Receive, answer: Answer) -> None:
        if scope["path_params"]["name"] != name:
            raise RequestError(404, "no such model here", code="model_not_found")
        await answer.whole(200, encode(model))

    async def health(scope: Scope, receive: Receive, answer: Answer) -> None:
        if not scheduler.alive:
            raise RequestError(503, "the model's thread has ended; restart the server")
        if stopping():
            raise RequestError(503, "the server is stopping")
        await answer.whole(200, encode({"status": "ok", "busy": scheduler.busy}))

    async def counts(scope: Scope, receive: Receive, answer: Answer) -> None:
        await answer.whole(200, metrics.text().encode(), prometheus.CONTENT_TYPE)

    def page(file: str, kind: str) -> Endpoint:
        # read once, at the start: a request for the page then touches no file
        data = resources.files("llavakit_plugins.serving").joinpath("page", file).read_bytes()

        async def endpoint(scope: Scope, receive: Receive, answer: Answer) -> None:
            await answer.whole(200, data, kind, {"content-security-policy": _POLICY})

        return endpoint

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, Asgi(endpoint, limits.send_seconds), methods=methods or ("GET",))

    routes = [
        route("/v1/chat/completions", chat, "POST"),
        route("/v1/models", table(lambda: {"object": "list", "data": [model]})),
        route("/v1/models/{name:path}", one_model),
        route("/health", health),
        route("/metrics", counts),
        *(route(path, page(file, kind)) for path, (file, kind) in _PAGE.items()),
    ]
    if heatmap is not None:
        routes.append(route("/v1/heatmaps", heatmap, "POST"))
    known = {route.path for route in routes}
    # a redirect would repeat the name that the client states, which may be another site's
    router = Router(routes=routes, redirect_slashes=False)
    return _Watched(router, guard, metrics, known, limits, stopping)


class _Watched:
    """Lets in who may ask, counts, logs, and keeps what goes wrong from the client."""

    def __init__(
        self,
        app: ASGIApp,
        guard: Guard,
        metrics: Metrics,
        known: Collection[str],
        limits: Limits,
        stopping: Callable[[], bool],
    ) -> None:
        self._app, self._guard, self._metrics, self._known = app, guard, metrics, known
        self._limits, self._stopping = limits, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets; and nothing to set up
            return
        begun, status, size = time.monotonic(), 0, 0
        origin = self._guard.allowed_origin(scope)

        async def watched(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                more = _SAFE | ({"access-control-allow-origin": origin} if origin else {})
                own = [(key.encode(), value.encode("latin-1")) for key, value in more.items()]
                message["headers"] = [*message["headers"], *own]
            else:
                size += len(message.get("body", b""))
            await send(message)

        answer = Answer(watched, self._limits.send_seconds)
        try:
            # before the key is checked, as a browser's first question comes without it
            if origin and scope["method"] == "OPTIONS":
                await _preflight(answer)
                return
            self._guard.check(scope)
            if self._stopping() and scope["method"] == "POST":
                raise RequestError(503, "the server is stopping", headers={"Retry-After": "30"})
            scope["app"] = self  # then what has no route is an exception, and not a text
            await self._app(scope, receive, watched)
        except Gone:
            status = status or 499  # as nginx writes it
        except RequestError as error:
            if status:
                raise
            await answer.error(error)
        except HTTPException as error:
            what = "has no such path" if error.status_code == 404 else "takes no such method there"
            found = RequestError(error.status_code, f"this server {what}", headers=error.headers)
            await answer.error(found)
        except Exception:
            _log.exception("an error of the server itself")
            if status:
                raise
            await answer.error(RequestError(500, "an error of the server; its log says more"))
        finally:
            # a label for each path that strangers try would let the metrics grow without end
            path = scope["path"] if scope["path"] in self._known else "other"
            self._metrics.request(path, status)
            _access.info(
                "%s %s %d %d bytes %.0f ms",
                on_one_line(scope["method"])[:16], on_one_line(scope["path"])[:100], status, size,
                1000 * (time.monotonic() - begun),
            )  # fmt: skip


async def _preflight(answer: Answer) -> None:
    """Tell a browser what a page of an allowed site may send."""
    await answer.whole(
        204, b"", "text/plain",
        {
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": "authorization, content-type",
            "access-control-max-age": "600",
        },
    )  # fmt: skip
