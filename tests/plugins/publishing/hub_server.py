"""A server that takes uploads as Hugging Face's hub does: repositories, LFS and commits over HTTP.

Its paths and bodies are those that huggingface_hub sends and reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}  #: What each was created with.
        self.files: dict[str, dict[str, bytes]] = {}  #: What was committed, by name and path.
        self.objects: dict[str, bytes] = {}  #: Large files, by their SHA-256.
        self.puts: list[str] = []  #: Large files that arrived, in order.
        self.lock = Lock()  #: Held while a file is counted: the client sends several at once.
        self.fail_after: int | None = None  #: How many large files are taken before it breaks.
        self.refuse: int | None = None  #: A status that every request gets.

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if not self._may():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, asked)
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}", "name": name}, status)
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[-2:-1] == ["preupload"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            large = {path: path.endswith((".safetensors", ".onnx")) for path in paths}
            self._json({"files": [
                {"path": path, "shouldIgnore": False,
                 "uploadMode": "lfs" if large[path] else "regular"} for path in paths
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        elif parts[-2:-1] == ["commit"]:
            self._commit("/".join(parts[2:4]), body)
        else:
            self._json({"error": f"no such path: {self.path}"}, 404)

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for item in objects:
            known = item["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            answers.append({**item, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": answers})

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'1' * 40}"
        self._json({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server, oid = self.server, self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        assert "Authorization" not in self.headers, "a store gets no token"
        with server.lock:
            taken = server.fail_after is None or len(server.puts) < server.fail_after
            if taken:
                server.objects[oid] = content
                server.puts.append(oid)
        if taken:
            self._json({})
        else:
            self._json({"error": "the disk is full"}, 400)

    def do_GET(self) -> None:
        if self._may():
            name = "/".join(self.path.partition("?")[0].split("/")[3:5])
            known = name in self.server.repositories
            self._json({"id": name, "sha": "1" * 40, "siblings": []}, 200 if known else 404)

    def _may(self) -> bool:
        status = self.server.refuse
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._json({"error": "no"}, status)
        return status is None

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
