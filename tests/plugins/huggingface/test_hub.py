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
from safetensors.torch import load_file
from tests.plugins.checkpoints.test_layouts_original import Made, make
from tests.plugins.families import qwen_tokenizer, their_model
from tests.plugins.made_checkpoints import PROMPTS, pictures

from llavakit import ModelError
from llavakit_plugins.huggingface.hub import PretrainedOptions, fetch_config, fetch_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"

READ = """\
import json, sys
import torch
import llavakit
from huggingface_hub.utils import disable_progress_bars
from llavakit.contracts.packing import Packing
from llavakit_plugins.language.causal_lm import CausalLM
from llavakit_plugins.vision.clip import Clip
from tests.plugins.made_checkpoints import PROMPTS, pictures

def parts(**options):
    language = CausalLM.create(CausalLM.Options(source="lab/language", **options))
    vision = Clip.create(Clip.Options(source="lab/clip")).eval()
    ids = torch.arange(1, 12)
    logits = language.logits(language.hidden(language.embed(ids), Packing.of([11])))
    return [logits.tolist(), vision(torch.linspace(-1, 1, 3072).view(1, 3, 32, 32)).tolist()]

def whole(name):
    model = llavakit.load(name, device="cpu")
    return model.logits(PROMPTS[0][0], pictures(1), raw=True).tolist()

disable_progress_bars()
found = []
for options in json.loads(sys.argv[1]):
    try:
        with torch.no_grad():
            found.append(whole(options) if isinstance(options, str) else parts(**options))
    except llavakit.ModelError as error:
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
        if not folder.is_dir():
            self._send(404, b"", error="RepoNotFound")
        elif revision not in ("main", COMMIT):
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
            if body:
                self.server.sent.append(rest[0])
            self._send(200, (folder / rest[0]).read_bytes(), body=body)

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
def served(tmp_path: Path) -> Made:
    """A language model in shards, an original LLaVA and its CLIP as a pickle, as older ones lie."""
    root = tmp_path / "served"
    their_model("qwen2").save_pretrained(root / "language", max_shard_size="40KB")
    qwen_tokenizer().save_pretrained(root / "language")
    made = make(root, whole_clip=True, pickle=True, mm_vision_tower="lab/clip")
    weights = made.tower / "model.safetensors"
    torch.save(load_file(weights), made.tower / "pytorch_model.bin")
    weights.unlink()
    return made


@pytest.fixture
def hub(served: Made) -> Iterator[Hub]:
    server = Hub(served.folder.parent)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def read(hub: Hub, home: Path, *asked: str | dict[str, str], offline: bool = False) -> list[Any]:
    """Return what a process of its own reads from the hub, or what it says where it cannot."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    command = [sys.executable, "-c", READ, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_names_are_fetched_once_and_read_as_folders_are(
    hub: Hub, served: Made, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    asked: Any = (
        {},
        {"revision": COMMIT},
        {"revision": "nowhere"},
        "lab/checkpoint",
        "lab/nothing",
    )
    first, same, nowhere, whole, nothing = read(hub, home, *asked)
    with torch.no_grad():
        theirs = their_model("qwen2")(input_ids=torch.arange(1, 12)[None]).logits[0]
    torch.testing.assert_close(torch.tensor(first[0]), theirs, atol=1e-5, rtol=1e-5)
    assert same == first
    assert nowhere.startswith("`lab/language` has no config.json")
    expected = served.logits(PROMPTS[0][0], pictures(1))
    torch.testing.assert_close(torch.tensor(whole), expected, atol=1e-5, rtol=1e-5)
    assert nothing.startswith("`lab/nothing` is no folder, and the hub's model of that name")
    again, lacking, still, nothing = read(hub, home, *asked[1:], offline=True)
    assert (again, still) == (first, whole)
    assert lacking.startswith("`lab/language` has no config.json")
    assert nothing.startswith("`lab/nothing` is no folder, and the hub's model of that name")
    shards = [file.name for file in (hub.root / "language").glob("*.safetensors")]
    assert len(shards) > 2
    fetched = [name for name in hub.sent if name.endswith((".safetensors", ".bin"))]
    assert sorted(fetched) == sorted([*shards, "pytorch_model.bin", "pytorch_model.bin"])


def test_a_shard_that_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    shard = next((hub.root / "language").glob("*.safetensors"))
    shard.unlink()
    (said,) = read(hub, tmp_path / "home", {})
    assert f"lacks {shard.name}, which model.safetensors.index.json names" in said


class Broken(Exception):
    """As httpx raises: of no common kind, and perhaps without a word."""


@pytest.mark.parametrize("said", ["the connection broke off", ""])
def test_a_connection_that_breaks_off_is_a_sentence(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import transformers.utils.hub

    def fetch(*_: object, **__: object) -> None:
        raise Broken(said)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(transformers.utils.hub, "cached_file", fetch)
    with pytest.raises(ModelError, match=f"cannot be had: {said or 'Broken'}"):
        fetch_folder("lab/model", None)
    with pytest.raises(ModelError, match=r"`lab/model` has no config\.json"):
        fetch_config(PretrainedOptions(source="lab/model"))
