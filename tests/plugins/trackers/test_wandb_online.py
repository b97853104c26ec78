"""The tracker `wandb` online: wandb's own client sends to a server on this machine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

KEY = "0123456789abcdef0123456789abcdef01234567"
BUCKET = {
    "id": "UnVu", "name": "run", "displayName": "run", "description": "", "config": "{}",
    "sweepName": None, "historyLineCount": 0,
    "project": {"id": "P", "name": "llavakit", "entity": {"id": "E", "name": "me"}},
}  # fmt: skip
PROGRAM = """\
import sys
from pathlib import Path
from llavakit_plugins.trackers.wandb import WandB
tracker = WandB(WandB.Options())
tracker.begin(Path(sys.argv[1]))
tracker.record({"time": 1.0, "step": "01-x", "event": "train", "at": 1, "loss": float(sys.argv[2])})
tracker.record({"time": 2.0, "step": "01-x", "event": "done", "steps": 3.0})
tracker.close()
"""


class Service(ThreadingHTTPServer):
    """Answers what the client asks before it sends, and keeps what it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: list[str] = []  #: Names that runs were created or resumed by.
        self.history: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            self.server.keys.add(self.headers.get("Authorization", ""))
            answer = {"data": self._data(json.loads(body))}
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += map(json.loads, lines)
        self._send(answer)

    def _data(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            self.server.runs.append(given["name"])
        names = given.get("files") or []
        files = [{"name": n, "uploadUrl": f"{self.server.url}/put/{n}"} for n in names]
        return {
            "viewer": {"id": "V", "username": "me", "entity": "me", "flags": "{}"},
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "model": {"bucket": None},
            "upsertBucket": {"bucket": {**BUCKET, "name": given.get("name")}, "inserted": True},
            "createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files},
        }

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send({})

    def do_GET(self) -> None:
        self._send({})

    def _send(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed (pip install 'llavakit[wandb]')"
)
def test_numbers_arrive_and_a_resumed_run_is_the_same_run(service: Service, tmp_path: Path) -> None:
    own = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
    said = ""
    for loss in ("4211.5", "7333.25"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), loss],
            env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    losses = [row["01-x/loss"] for row in service.history if "01-x/loss" in row]
    assert losses == [4211.5, 7333.25]
    assert len(set(service.runs)) == 1
    assert len(service.keys) == 1, "one key for all of it"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in said
