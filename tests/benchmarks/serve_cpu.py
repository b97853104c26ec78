"""Many clients at once on a CPU: `llava-run serve` against `transformers serve`, the same weights.

    python tests/benchmarks/serve_cpu.py [--models tiny,large] [--clients 16] [--new 48]

`tiny` has the shapes of recipes/tiny.toml, `large` a CLIP B/16 and a Llama of 12 layers x 768;
random weights, answers of a fixed length, another question in every request; `--image` adds an
image, whose reading then is most of the work. One load program asks both servers, by turns: a
quarter of the requests one by one, and all at once. Exits with 1 where a ratio misses its limit.
transformers 5 serves models that see one request at a time, whatever its flags say.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from llavakit import Exporter, Registry, Use, save_model
from llavakit.model.folder import create_model
from llavakit.recipe.model_choice import ModelRecipe

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"image_size": 72, "patch_size": 24, "hidden_size": 96, "intermediate_size": 192,
         "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 128},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 1024},
    ),
    "large": (
        {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072,
         "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 512},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 12, "vocab_size": 32000, "max_position_embeddings": 2048},
    ),
}  # fmt: skip
LIMITS = {"batching": 4.0, "throughput": 2.0, "first": 1.0}


class Measured(NamedTuple):
    rate: float  #: Tokens a second, of all clients.
    first: float  #: Seconds to the first token, the median.


def make_models(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a model in our layout and in that of transformers; return the folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vision, language = SHAPES[name]
    parts = {
        "vision": {"use": "clip", "config": vision},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "config": {**language, "eos_token_id": 2}},
        "template": {"use": "vicuna_v1", "system": ""},
    }
    model = create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0).eval()
    with torch.no_grad():
        model.language.head.weight[2] = 0.0  # the end token is never the likeliest
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = [f"w{n}" for n in range(language["vocab_size"] - 16 - len(special))]
    vocabulary = {word: n for n, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.language.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    ours, theirs = folder / f"{name}-llavakit", folder / f"{name}-transformers"
    save_model(model, ours)
    Registry.installed().build(Use[Exporter](use="hf")).export(model, theirs)
    return ours, theirs


@contextmanager
def server(command: Sequence[str], port: int | None) -> Iterator[str]:
    """Yield the address of a server that is started for the block."""
    # for both: on a machine with other work, threads that spin while they wait cost either dearly
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield _ready(process, log, port)
        finally:
            process.terminate()
            process.wait(60)


def _ready(process: subprocess.Popen[bytes], log: Any, port: int | None) -> str:
    """Return the address of a server once it answers."""
    address = None if port is None else f"http://127.0.0.1:{port}"
    while process.poll() is None:
        time.sleep(0.2)
        log.seek(0)
        written = log.read()
        found = re.search(r"^serving .* on (http://\S+)", written, re.MULTILINE)
        address = found[1] if found else address
        if address is not None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                return address
            except OSError:
                continue
    raise SystemExit(f"{process.args!r} ended: {written[-2000:]}")


async def drain(reader: asyncio.StreamReader, begun: float) -> float:
    """Read a streamed answer to its end; return the time to its first text."""
    first, data = 0.0, b""
    while part := await reader.read(1 << 16):
        data += part
        if not first and re.search(rb'"content": ?"[^"]', data):
            first = time.perf_counter() - begun
        if b"[DONE]" in data or b'"finish_reason":"length"' in data:
            break
    if b"200 OK" not in data[:20] or not first:
        raise SystemExit(f"no answer: {data[:500]!r}")
    return first


async def ask(address: str, body: dict[str, Any]) -> float:
    host, port = address.removeprefix("http://").split(":")
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    first = await drain(reader, begun)
    writer.close()
    return first


async def load(
    address: str, bodies: Sequence[dict[str, Any]], together: bool, new: int
) -> Measured:
    """Ask all of it, one by one or at once."""
    begun = time.perf_counter()
    if together:
        firsts = await asyncio.gather(*(ask(address, body) for body in bodies))
    else:
        firsts = [await ask(address, body) for body in bodies]
    seconds = time.perf_counter() - begun
    return Measured(len(bodies) * new / seconds, statistics.median(firsts))


def requests(model: str, count: int, new: int, edge: int | None) -> list[dict[str, Any]]:
    """Return requests with another question each, and an image of so many pixels."""
    draw = np.random.default_rng(0)
    bodies = []
    for number in range(count):
        words = " ".join(f"w{n}" for n in draw.integers(0, 400, 8 + number % 8))
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if edge is not None:
            file = io.BytesIO()
            pixels = draw.integers(0, 256, (edge, edge, 3), np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        bodies.append(
            {"model": model, "messages": [{"role": "user", "content": content}],
             "max_tokens": new, "temperature": 0.0, "stream": True}
        )  # fmt: skip
    return bodies


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="tiny,large")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", action="store_true", help="an image in every request")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    arguments = parser.parse_args()
    missed = False
    image = ", an image each" if arguments.image else ""
    print(f"{arguments.clients} clients, {arguments.new} tokens an answer{image}")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        for name in arguments.models.split(","):
            ours, theirs = make_models(name, Path(place))
            run = [
                str(Path(sys.executable).parent / "llava-run"),
                "serve",
                str(ours),
                "--port",
                "0",
            ]
            servers = {"llavakit": (stack.enter_context(server([*run, "--name", "m"], None)), "m")}
            if not arguments.alone:
                command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
                command += [str(theirs), "--port", "8399", "--device", "cpu"]
                address = stack.enter_context(server(command, 8399))
                servers["transformers"] = address, str(theirs)
            found: dict[tuple[str, bool], list[Measured]] = {}
            edge = SHAPES[name][0]["image_size"] if arguments.image else None
            for round_ in range(arguments.rounds + 1):
                for peer, (address, model) in servers.items():
                    bodies = requests(model, arguments.clients, arguments.new, edge)
                    few = bodies[: max(2, len(bodies) // 4)]
                    for together in (False, True):
                        asked = bodies if together and round_ else few  # the first warms up
                        one = asyncio.run(load(address, asked, together, arguments.new))
                        if round_:
                            found.setdefault((peer, together), []).append(one)
            missed |= report(name, found)
            stack.pop_all().close()
    return int(missed)


def report(name: str, found: dict[tuple[str, bool], list[Measured]]) -> bool:
    """Print a table; return whether a limit was missed."""
    print(f"\n{name:14}{'one by one':>22}{'all at once':>22}{'first token alone':>20}")
    for peer in dict.fromkeys(peer for peer, _ in found):
        alone, together = found[peer, False], found[peer, True]
        rates = [statistics.median(one.rate for one in of) for of in (alone, together)]
        first = statistics.median(one.first for one in alone)
        print(f"{peer:14}{rates[0]:14.1f} tokens/s{rates[1]:13.1f} tokens/s{first * 1000:17.0f} ms")

    def ratio(above: list[Measured], below: list[Measured], what: str) -> float:
        pairs = zip(above, below, strict=True)
        return float(statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs))

    ratios = {"batching": ratio(found["llavakit", True], found["llavakit", False], "rate")}
    if ("transformers", True) in found:
        ratios["throughput"] = ratio(found["llavakit", True], found["transformers", True], "rate")
        ratios["first"] = ratio(found["llavakit", False], found["transformers", False], "first")
    missed = False
    for what, value in ratios.items():
        low = what != "first"
        good = value >= LIMITS[what] if low else value <= LIMITS[what]
        missed |= not good
        sign = ">=" if low else "<="
        print(
            f"  {what:12}{value:7.2f}   limit {sign} {LIMITS[what]:g}{'' if good else '   MISSED'}"
        )
    return missed


if __name__ == "__main__":
    sys.exit(main())
