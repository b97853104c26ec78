"""Names on the hub: fetched once over HTTP, then read from the cache; the rest is named."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tests.plugins.families import qwen_tokenizer, their_model
from transformers import CLIPConfig, CLIPModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip

READ = """\
import json, sys
import torch
from huggingface_hub.utils import disable_progress_bars
from llavakit import ModelError
from llavakit.packing import Packing
from llavakit_plugins.language.causal_lm import CausalLM
from llavakit_plugins.vision.clip import Clip

def read(**options):
    language = CausalLM.create(CausalLM.Options(source="lab/language", **options))
    vision = Clip.create(Clip.Options(source="lab/clip")).eval()
    with torch.no_grad():
        ids = torch.arange(1, 12)
        logits = language.logits(language.hidden(language.embed(ids), Packing.of([11])))
        features = vision(torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28))
    return [logits.tolist(), features.tolist()]

disable_progress_bars()
found = []
for options in json.loads(sys.argv[1]):
    try:
        found.append(read(**options))
    except ModelError as error:
        found.append(str(error))
print(json.dumps(found))
"""


class Hub(ThreadingHTTPServer):
    """Serves folders as the hub does.

    `/NAME/resolve/REVISION/FILE` is a file, `/api/models/NAME/tree/REVISION` lists them all.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.sent: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        name, kind, revision, *rest = [*(parts[3:] if listing else parts[1:]), "", "main", ""]
        folder = self.server.root / name
        if revision not in ("main", COMMIT):
            self._send(404, b"", error="RevisionNotFound")
        elif kind == "tree":
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in sorted(folder.iterdir())
            ]
            self._send(200, json.dumps(files).encode())
        elif listing:
            self._send(200, json.dumps({"id": name, "sha": COMMIT}).encode())
        elif kind != "resolve" or not (folder / rest[0]).is_file():
            self._send(404, b"", error="EntryNotFound")
        else:
            self._send(200, (folder / rest[0]).read_bytes(), body=body)
            if body:
                self.server.sent.append(rest[0])

    def _send(
        self, status: int, content: bytes, *, body: bool = True, error: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    their_model("qwen2").save_pretrained(tmp_path / "served/language", max_shard_size="40KB")
    qwen_tokenizer().save_pretrained(tmp_path / "served/language")
    torch.manual_seed(0)
    vision = SHAPE | {"image_size": 28, "patch_size": 7}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=SHAPE | {"vocab_size": 64}))
    clip = tmp_path / "served/clip"
    whole.save_pretrained(clip)
    (clip / "model.safetensors").unlink()
    torch.save(whole.state_dict(), clip / "pytorch_model.bin")  # as older models lie there
    server = Hub(tmp_path / "served")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def read(hub: Hub, home: Path, *asked: dict[str, str], offline: bool = False) -> list[Any]:
    """Return what a process of its own reads from the hub, or what it says where it cannot."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    command = [sys.executable, "-c", READ, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_names_are_fetched_once_and_read_as_folders_are(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first, same, nowhere = read(hub, home, {}, {"revision": COMMIT}, {"revision": "nowhere"})
    with torch.no_grad():
        theirs = their_model("qwen2")(input_ids=torch.arange(1, 12)[None]).logits[0]
    torch.testing.assert_close(torch.tensor(first[0]), theirs, atol=1e-5, rtol=1e-5)
    assert same == first
    assert nowhere.startswith("`lab/language` has no config.json")
    again, lacking = read(hub, home, {}, {"revision": "nowhere"}, offline=True)
    assert again == first
    assert lacking.startswith("`lab/language` has no config.json")
    shards = [file.name for file in (hub.root / "language").glob("*.safetensors")]
    assert len(shards) > 2
    fetched = [name for name in hub.sent if name.endswith((".safetensors", ".bin"))]
    assert sorted(fetched) == sorted([*shards, "pytorch_model.bin"])


def test_a_shard_that_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    shard = next((hub.root / "language").glob("*.safetensors"))
    shard.unlink()
    (said,) = read(hub, tmp_path / "home", {})
    assert f"lacks {shard.name}, which model.safetensors.index.json names" in said
