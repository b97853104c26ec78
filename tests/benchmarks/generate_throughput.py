"""Generating against a local service that answers after a fixed time: rate and memory.

    python tests/benchmarks/generate_throughput.py [--requests 6000] [--concurrency 64]
    python tests/benchmarks/generate_throughput.py --contexts 100000

The ideal rate is concurrency / latency. The service is a process of its own on 127.0.0.1. With
`--contexts`, memory: a run over so many contexts whose ledger holds every reply but the last few,
which is when most lies in memory. The limit is 500 MB for the whole process, imports and all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

KEY = "sk-benchmark-0123456789"
REPLY = (
    "The picture shows thing {n}. Nothing else is certain about it, and so the answer ends here."
)


def serve(pipe: Connection, latency: float) -> None:
    """Answer every chat completion after `latency` seconds."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = head.lower().split(b"content-length:")
                body = await reader.readexactly(int(fields[1].split(b"\r\n")[0]))
                number += 1
                await asyncio.sleep(latency)
                text = REPLY.format(n=hash(body))
                data = json.dumps({
                    "id": "x", "object": "chat.completion", "created": 1, "model": "gpt-4o",
                    "choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 1500, "completion_tokens": 20},
                }).encode()  # fmt: skip
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=512)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def write_contexts(path: Path, count: int) -> None:
    """Write contexts as large as COCO's: five captions and seven boxes."""
    with path.open("w") as file:
        for number in range(count):
            captions = [f"Thing {number} as person {k} saw it beside the road." for k in range(5)]
            boxes = [{"category": "person", "bbox": [0.123, 0.234, 0.345, 0.456]}] * 7
            row = {"id": f"{number:08}", "image": f"{number:08}.jpg", "captions": captions,
                   "instances": boxes}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def write_recipe(folder: Path, port: int, concurrency: int, contexts: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(
        f'name = "benchmark"\n[[steps]]\nuse = "generate"\ncontexts = "{contexts}"\n'
        f'kinds = ["detail"]\nconcurrency = {concurrency}\n[steps.generator]\nuse = "prompted"\n'
        f'[steps.generator.chat]\nuse = "openai"\nmodel = "gpt-4o"\n'
        f'base_url = "http://127.0.0.1:{port}/v1"\nprice = {{ input = 2.5, output = 10 }}\n'
    )
    return path


def fill_ledger(path: Path, recipe: Path, contexts: Path, but: int) -> None:
    """Write the ledger of a run that has every reply but the last."""
    from dataclasses import asdict

    from llavakit import Generator, Reply
    from llavakit.contracts.component import Use
    from llavakit.recipe.recipe import Recipe
    from llavakit.registry import Registry
    from llavakit_plugins.generation.contexts import read_contexts
    from llavakit_plugins.generation.requests.ledger import Request, record_of
    from llavakit_plugins.generation.requests.prompted import PromptedGenerator

    registry = Registry.installed()
    table = Recipe.load(recipe, registry).steps[0].options["generator"]
    generator = registry.build(Use[Generator].model_validate(table))
    assert isinstance(generator, PromptedGenerator)
    rows = list(read_contexts(contexts))[:-but]
    with path.open("w") as file:
        for number, context in enumerate(rows):
            request = Request(generator.messages(context, "detail"), 0, context.id)
            reply = Reply(REPLY.format(n=number), "stop", "gpt-4o", 1500, 20, 0.004)
            entry = record_of(generator.chat.identity, request).entry(reply)
            file.write(json.dumps(asdict(entry)) + "\n")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--contexts", type=int)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    arguments = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = KEY
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, arguments.latency), daemon=True
    )
    server.start()
    port = here.recv()
    from llavakit.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contexts = folder / "contexts.jsonl"
        recipe = write_recipe(folder, port, arguments.concurrency, contexts)
        command = [str(recipe), "--out", str(folder / "run")]
        if arguments.contexts is None:
            write_contexts(contexts, 2)
            main([str(recipe), "--out", str(folder / "warm")])  # so that imports are not measured
            write_contexts(contexts, arguments.requests)
            assert main(command) == 0
            ledger = folder / "run" / "01-generate" / "ledger.sqlite"
            with closing(sqlite3.connect(ledger)) as database:
                stamps = [time for (time,) in database.execute("SELECT time FROM replies")]
            seconds = max(stamps) - min(stamps)
            rate, ideal = (len(stamps) - 1) / seconds, arguments.concurrency / arguments.latency
            print(f"{'':28}{'ours':>10}{'ideal':>10}{'ratio':>10}{'limit':>10}")
            print(
                f"{'replies a second':28}{rate:>10.1f}{ideal:>10.1f}{rate / ideal:>10.3f}{0.9:>10}"
            )
        else:
            write_contexts(contexts, arguments.contexts)
            kid = multiprocessing.get_context("spawn").Process(
                target=_fill, args=(folder, recipe, contexts)
            )
            kid.start()
            kid.join()
            earlier = folder / "run" / "superseded" / "01-generate.1"
            earlier.mkdir(parents=True)
            (folder / "ledger.jsonl").rename(earlier / "ledger.jsonl")
            begun, cpu = time.monotonic(), time.process_time()
            assert main(command) == 0
            seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
            print(f"{'':28}{'ours':>10}{'limit':>10}")
            print(f"{'contexts':28}{arguments.contexts:>10,}")
            print(f"{'seconds, all but 64 known':28}{seconds:>10.1f}")
            print(f"{'CPU seconds':28}{cpu:>10.1f}")
            print(f"{'MB, imports and all':28}{_peak_mb():>10.0f}{500:>10}")
            print(f"{'torch imported':28}{'yes' if 'torch' in sys.modules else 'no':>10}{'no':>10}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    server.terminate()


def _fill(folder: Path, recipe: Path, contexts: Path) -> None:
    fill_ledger(folder / "ledger.jsonl", recipe, contexts, 64)


def _peak_mb() -> float:
    """Return the most memory that this process had at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run()
