"""Tar shards as Python's tarfile writes them, and a server that has files in parts."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Members = Sequence[tuple[str, bytes]]


def picture(seed: int, format: str = "PNG") -> bytes:
    """Return a small image's file; its size depends on the seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 5, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def row(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], images: Path, shards: int) -> str:
    """Write LLaVA's rows, with their images, in shards; return the shards' name with braces."""
    for number in range(shards):
        members: list[tuple[str, bytes]] = []
        for at in range(number * len(rows) // shards, (number + 1) * len(rows) // shards):
            if name := rows[at].get("image"):
                members.append((f"{at:06}.png", (images / name).read_bytes()))
            members.append((f"{at:06}.json", row(**rows[at])))
        write_tar(folder / f"shard-{number:03}.tar", members)
    return str(folder / f"shard-{{000..{shards - 1:03}}}.tar")


class _Handler(SimpleHTTPRequestHandler):
    """Answers for parts of files, which Python's own does not; or fails as often as it is told."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        if server.failing > 0:
            server.failing -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file() or not server.knows_ranges or "Range" not in self.headers:
            super().do_GET()
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        data = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the address of a server for the files of a folder, and the server."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    server.asked, server.failing, server.knows_ranges = [], 0, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
