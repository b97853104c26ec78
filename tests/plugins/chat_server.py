"""A service on 127.0.0.1 that speaks OpenAI's protocol, counts requests, and fails to order."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"
TEACHER = """\
[steps.generator]
use = "prompted"
[steps.generator.chat]
use = "openai"
model = "gpt-4o"
base_url = "{url}"
price = {{ input = 10, output = 100 }}
"""  # a recipe's generator that asks the service at `url`

Action = Callable[["Handler", dict[str, Any]], None]


@dataclass
class Service:
    """What the server does and what it saw."""

    actions: list[Action] = field(default_factory=list)
    """What to do with the next requests; then `otherwise`."""
    otherwise: Action = lambda handler, body: handler.answer("It is red.")
    asked: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: Service

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        service = self.service
        if self.path.endswith("/files"):
            self.upload(data)
            return
        body = json.loads(data)
        with service.lock:
            service.paths.append(self.path)
            if self.path.endswith("/chat/completions"):
                service.asked.append(body)
                service.times.append(time.monotonic())
                action = service.actions.pop(0) if service.actions else service.otherwise
                service.at_once += 1
                service.most_at_once = max(service.most_at_once, service.at_once)
            else:
                action = Handler.create_batch
        try:
            if self.headers.get("Authorization") == f"Bearer {KEY}":
                action(self, body)
            else:
                self.fail(401, f"Incorrect API key: {self.headers.get('Authorization')}")
        finally:
            with service.lock:
                service.at_once -= 1

    def do_GET(self) -> None:
        service = self.service
        last = self.path.partition("?")[0].rsplit("/", 1)[-1]
        if last == "models":
            self.json(200, {"object": "list", "data": [{"id": "gpt-4o", "object": "model"}]})
        elif last == "batches":
            rows = list(service.batches.values())[::-1]
            self.json(200, {"object": "list", "data": rows, "has_more": False})
        elif last == "content":
            self.send(200, service.files[self.path.split("/")[-2]], "application/binary")
        elif last in service.batches:
            self.work_on(service.batches[last])
            self.json(200, service.batches[last])
        else:
            self.fail(404, "no such thing")

    # -- answers -----------------------------------------------------------------------------------

    def answer(self, text: str, finish: str = "stop", **more: Any) -> None:
        self.json(200, completion(text, finish, **more))

    def fail(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.json(status, {"error": {"message": message, "code": code, "type": "x"}}, **headers)

    def json(self, status: int, table: Any, **headers: str) -> None:
        self.send(status, json.dumps(table).encode(), "application/json", **headers)

    def send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def half(self, data: bytes) -> None:
        """Announce more than is sent, and hang up."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(2 * len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.hang_up()

    def raw(self, data: bytes) -> None:
        """Answer with these bytes, head and all, and hang up."""
        self.wfile.write(data)
        self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    # -- batches -----------------------------------------------------------------------------------

    def upload(self, data: bytes) -> None:
        boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
        parts = data.split(b"--" + boundary)
        (content,) = [part for part in parts if b'name="file"' in part]
        name = f"file-{len(self.service.files)}"
        self.service.files[name] = content.partition(b"\r\n\r\n")[2].rstrip(b"\r\n")
        self.json(200, {"id": name, "object": "file", "bytes": 1, "created_at": 1,
                        "filename": "x", "purpose": "batch", "status": "processed"})  # fmt: skip

    def create_batch(self, body: dict[str, Any]) -> None:
        name = f"batch-{len(self.service.batches)}"
        self.service.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "created_at": 1,
            "completion_window": "24h", "input_file_id": body["input_file_id"],
            "metadata": body.get("metadata"), "status": "in_progress", "looks": 0,
        }  # fmt: skip
        self.json(200, self.service.batches[name])

    def work_on(self, batch: dict[str, Any]) -> None:
        """Finish a batch at the second look."""
        batch["looks"] += 1
        if batch["looks"] != 2:
            return
        lines = []
        for line in self.service.files[batch["input_file_id"]].splitlines():
            row = json.loads(line)
            self.service.asked.append(row["body"])
            response = {"status_code": 200, "body": self.in_batch(row["body"])}
            lines.append(json.dumps({"custom_id": row["custom_id"], "response": response}))
        name = f"file-{len(self.service.files)}"
        self.service.files[name] = "\n".join(reversed(lines)).encode()
        batch |= {"status": "completed", "output_file_id": name}

    def in_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        return completion("It is red.")

    def log_message(self, *arguments: object) -> None:
        pass


def completion(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """Return the body of a chat completion."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        **more,
    }  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed, or that we hung up on


@contextmanager
def serve(service: Service | None = None, handler: type[Handler] = Handler) -> Iterator[Service]:
    """Yield a running service; it ends with the block."""
    service = service or Service()
    bound = type("Bound", (handler,), {"service": service})
    server = _Server(("127.0.0.1", 0), bound)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def user_text(body: dict[str, Any]) -> str:
    """Return what the last message of a request says, in words."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return str(content)


def images_of(body: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Return the type and the bytes of each image of a request, decoded from its addresses."""
    parts = [
        part
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    found = []
    for part in parts:
        head, _, data = part["image_url"]["url"].partition(",")
        assert head.startswith("data:")
        assert head.endswith(";base64")
        found.append((head[5:-7], b64decode(data, validate=True)))
    return found


def teach(handler: Handler, body: dict[str, Any]) -> None:
    """Answer as a teacher would that knows no more than the first caption."""
    handler.answer(lesson(body))


def lesson(body: dict[str, Any]) -> str:
    """Return a usable reply to a request of the prompted generator."""
    system, told = body["messages"][0]["content"], user_text(body)
    seen = told.splitlines()[0].rstrip(".").lower()
    if "===" not in system:
        return f"The picture shows {seen}. Nothing else is certain."
    pair = "Question:\nWhat {verb}?\n===\nAnswer:\nOne sees {seen}{more}.\n===\n"
    if "conversation" in system:
        return pair.format(verb="is there", seen=seen, more="") + pair.format(
            verb="else is there", seen="nothing more than", more=f" {seen}"
        )
    return pair.format(verb="may happen next", seen=seen, more=", so all will go well")
