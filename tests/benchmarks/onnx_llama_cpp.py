"""Our ONNX folder in onnxruntime against llama.cpp on the same weights, on a CPU.

    python tests/benchmarks/onnx_llama_cpp.py [--rounds 5] [--threads 2] [--keep FOLDER]

CLIP B/16 and a Llama of 12 layers x 768 with random weights, exported by us to ONNX and to GGUF.
llama.cpp comes from llama-cpp-python's sources, which are fetched and built for this very CPU: that
takes two processor cores about five minutes. Where they cannot be had or built, the reason is said
and the exit code is 2. `--keep` leaves the build and the models in a folder, and finds them again.

A prompt of 212 tokens, then 64 more one at a time, and the first token behind one image of the
encoder's own size and a short text, from the file's bytes on. Each side is a process of its own;
ours and theirs take turns, ratios are medians over these pairs and above 1 where ours is faster.
Files and memory are those of the text model (embeddings and decoder): what the process holds after
the runs, its imports included, and its peak. llama.cpp maps its files, and their pages count.
`--threads 1 --cpu-time` counts the seconds that each process computes: for a machine with other
work, where two threads wait for each other.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

SOURCES = "llama-cpp-python==0.3.36"
ROWS, NEW, SEED = 212, 64, 0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PAUSE = 0.2
"""Seconds in front of a run: the other side's threads spin for a while behind one."""
PICTURE = "picture.png"
QUESTION = "What is in the picture?"
PAIRS = (
    ("fp32", "f32"), ("int8", "q8_0"), ("q8", "q8_0"), ("q4", "q4_0"), ("q4", "q4_0-pure"),
    ("q4/float", "q4_0-pure"),
)  # fmt: skip
"""Our precision, and the type of llama.cpp that is its like. `pure` has the embeddings and the head
in 4 bits, too; else llama.cpp keeps the head in 6 bits. q4 has an 8-bit cache, with `/float` one of
32; theirs has 16 bits everywhere."""
Clock = Callable[[], float]
FTYPES = {"q4_0": (2, False), "q4_0-pure": (2, True)}
"""llama.cpp's numbers of file types (`llama_ftype`), and whether all matrices have it."""


# -- what is compared ----------------------------------------------------------------------------


def build(folder: Path) -> Path:
    """Return the interpreter of an environment with llama.cpp, built here unless it is there.

    Raises RuntimeError with the reason where that does not work.
    """
    python = folder / "environment" / "bin" / "python"
    if python.exists():
        return python
    sources = folder / "sources"
    base = [sys.executable, "-m"]
    own = [str(python), "-m", "pip", "--quiet"]
    try:
        _call([*base, "pip", "--quiet", "download", "--no-deps", "--no-binary",
               "llama-cpp-python", "--dest", str(sources), SOURCES])  # fmt: skip
        (archive,) = sources.glob("llama_cpp_python-*.tar.gz")
        _call([*base, "venv", str(folder / "environment")])
        print("building llama.cpp; it takes minutes", file=sys.stderr)
        _call([*own, "install", str(archive)], CMAKE_ARGS="-DGGML_NATIVE=ON")
    except RuntimeError:
        if python.exists():
            python.unlink()  # half an environment must not be found the next time
        raise
    return python


def _call(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in lines if "rror" in line] or lines or ["no reason given"]
        raise RuntimeError(f"`{' '.join(command[2:5])}` failed: {wrong[0].strip():.200}")


def write_models(folder: Path, python: Path, layers: int) -> None:
    """Export one model in all forms, unless it is there."""
    from tests.benchmarks.onnx_cpu import LANGUAGE, VISION
    from tests.core.peer import make_pair

    from llavakit.testing import byte_tokenizer
    from llavakit_plugins.gguf.exporter import Gguf, GgufOptions
    from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions

    wanted: dict[str, list[str]] = {}
    for own in dict.fromkeys(own for own, _ in PAIRS):
        place, precision = exported(folder, own)
        wanted.setdefault(place.name, []).append(precision)
    missing = [name for name in (*wanted, "f32", "q8_0") if not (folder / name).exists()]
    if missing:
        shorter = {"num_hidden_layers": layers}
        _, model = make_pair(VISION | shorter, LANGUAGE | shorter)
        model.language.tokenizer = byte_tokenizer()
        for name, precisions in wanted.items():
            if name in missing:
                options = OnnxOptions.model_validate(
                    {
                        "precisions": precisions,
                        "cache": "auto" if name == "onnx" else "float",
                        "tolerance": 1e-3,
                        "least_agreement": dict.fromkeys(("int8", "q8", "q4"), 0.0),
                    }
                )
                Onnx(options).export(model, folder / name)
        for kind in ("f32", "q8_0"):
            if kind in missing:
                # a type for the vision encoder as well, which llama.cpp's own tools leave in f16
                settings = GgufOptions.model_validate({"type": kind, "vision_type": "f16"})
                Gguf(settings).export(model, folder / kind)
    for kind in FTYPES:
        if not (folder / kind).exists():
            command = [str(python), __file__, "--quantise", kind, str(folder)]
            subprocess.run(command, check=True, capture_output=True)


def exported(folder: Path, own: str) -> tuple[Path, str]:
    """Return the folder of graphs and the precision that `own` of PAIRS means."""
    precision, slash, cache = own.partition("/")
    return folder / ("onnx" + slash.replace("/", "-") + cache), precision


def quantise(kind: str, folder: Path) -> None:
    """Have llama.cpp write 4 bits of what we wrote in 32."""
    import llama_cpp

    target = folder / kind
    target.mkdir(exist_ok=True)
    (vision,) = (folder / "f32").glob("mmproj-*.gguf")
    (target / vision.name).hardlink_to(vision)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure = FTYPES[kind]
    (source,) = (folder / "f32").glob("model-*.gguf")
    written = str(target / f"model-{kind}.gguf").encode()
    if llama_cpp.llama_model_quantize(str(source).encode(), written, settings):
        raise SystemExit(f"llama.cpp could not write {kind}")


# -- one side ------------------------------------------------------------------------------------


def ours(folder: Path, own: str, threads: int, clock: Clock, *, image: bool) -> Callable[[], Any]:
    """Return what runs our side once."""
    import numpy as np

    from llavakit_plugins.onnx.runtime import load
    from llavakit_plugins.onnx.runtime.folder import read
    from llavakit_plugins.onnx.runtime.layout import DECODER, EMBEDDINGS
    from llavakit_plugins.onnx.runtime.sessions import Decoder, open_session

    place, precision = exported(folder, own)
    if image:
        from PIL import Image

        from llavakit import Prefixes

        model = load(place, precision=precision, device="cpu", threads=threads)
        model.prefixes = Prefixes(0)  # it would remember the image
        data = (folder / PICTURE).read_bytes()

        def first() -> float:
            begin = clock()
            shown = Image.open(io.BytesIO(data))
            model.generate_ids(f"<image>\n{QUESTION}", [shown], max_new_tokens=1, raw=True)
            return clock() - begin

        return first
    checked, _ = read(place, precision)
    embed, inner = (
        open_session(checked, graph, precision, "cpu", threads) for graph in (EMBEDDINGS, DECODER)
    )
    decoder = Decoder(inner, checked.manifest.shapes, in_place=True, provider="cpu")
    prompt_1T = np.asarray([ids()], np.int64)

    def rows(ids_BT: Any) -> Any:
        return embed.run(None, {"input_ids": ids_BT})[0]

    def both() -> tuple[float, float]:
        begin = clock()
        logits = decoder.read(rows(prompt_1T), np.ones_like(prompt_1T), keep=1, capacity=ROWS + NEW)
        token = int(logits[0, -1].argmax())
        read_at = clock()
        for position in range(ROWS, ROWS + NEW):
            step = rows(np.asarray([[token]], np.int64))
            token = int(decoder.step(step, np.asarray([[position]], np.int64))[0].argmax())
        done = clock()
        decoder.release()
        return read_at - begin, done - read_at

    return both


def theirs(
    folder: Path, kind: str, threads: int, clock: Clock, *, image: bool
) -> Callable[[], Any]:
    """Return what runs llama.cpp's side once."""
    import llama_cpp
    import numpy as np
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    (path,) = map(str, (folder / kind).glob("model-*.gguf"))
    options: dict[str, Any] = {
        "n_ctx": 512, "n_threads": threads, "n_threads_batch": threads, "flash_attn": True,
        "verbose": False,
    }  # fmt: skip
    if image:
        (projector,) = map(str, (folder / kind).glob("mmproj-*.gguf"))
        url = f"data:image/png;base64,{base64.b64encode((folder / PICTURE).read_bytes()).decode()}"
        handler = Llava15ChatHandler(clip_model_path=projector, verbose=False)
        handler.CHAT_FORMAT = f"{url}\n{QUESTION}"
        model = llama_cpp.Llama(path, chat_handler=handler, **options)
        content = [{"type": "image_url", "image_url": {"url": url}}]

        def first() -> float:
            begin = clock()
            model.create_chat_completion(
                messages=[{"role": "user", "content": content}], max_tokens=1, temperature=0.0
            )
            return clock() - begin

        return first
    model = llama_cpp.Llama(path, **options)
    words = model.n_vocab()
    prompt = (llama_cpp.llama_token * ROWS)(*ids())

    def decode(tokens: Any) -> int:
        context = model.ctx  # not the context alone: `model` frees it when nothing holds it
        batch = llama_cpp.llama_batch_get_one(tokens, len(tokens))
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not read the prompt")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (words,)).argmax())

    def both() -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        begin = clock()
        token = decode(prompt)
        read_at = clock()
        for _ in range(NEW):
            token = decode((llama_cpp.llama_token * 1)(token))
        return read_at - begin, clock() - read_at

    return both


def ids() -> list[int]:
    import numpy as np

    return [int(one) for one in np.random.default_rng(SEED).integers(3, 259, ROWS)]


def serve(side: str, folder: Path, kind: str, threads: int, what: str, clock: Clock) -> None:
    """Run once for each line of the input; print the seconds, and the memory behind the last."""
    run = (ours if side == "ours" else theirs)(folder, kind, threads, clock, image=what == "image")
    for _ in sys.stdin:
        seconds = run()
        table = dict(
            line.split(":") for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("Vm")
        )  # fmt: skip
        held = [int(table[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")]
        print(json.dumps([seconds, held]), flush=True)


# -- both ----------------------------------------------------------------------------------------


class Process:
    """One side, in a process of its own."""

    def __init__(self, python: Path | str, *settings: str) -> None:
        self._process = subprocess.Popen(
            [str(python), __file__, "--serve", *settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.held: list[int] = []

    def run(self) -> Any:
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self._process.args[3:]))} failed")  # type: ignore[index]
        seconds, self.held = json.loads(answer)
        return seconds

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def draw_picture(path: Path) -> None:
    """Write an image of the encoder's own size."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(SEED).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(path)


def measure(
    folder: Path, python: Path, pair: tuple[str, str], rounds: int, threads: int, clock: str
) -> str:
    """Return a line of the table."""
    own, other = pair
    cells, memory = [f"{own:>7} {other:>9}"], []
    for what in ("text", "image"):
        a = Process(sys.executable, "ours", str(folder), own, str(threads), what, clock)
        b = Process(python, "theirs", str(folder), other, str(threads), what, clock)
        found = []
        for number in range(rounds + 1):  # the first is to warm up
            taken = (a.run(), b.run())
            if number:
                found.append(taken)
        for part in range(2) if what == "text" else [0]:
            seconds = [[one[part] if what == "text" else one for one in pairs] for pairs in found]
            ratio = median(other / own for own, other in seconds)
            mine, yours = (median(column) for column in zip(*seconds, strict=True))
            if what == "text":
                count = (ROWS, NEW)[part]
                cells.append(f"{count / mine:8.0f} {count / yours:6.0f} {ratio:5.2f}x")
            else:
                cells.append(f"{mine:8.3f} {yours:6.3f} {ratio:5.2f}x")
        if what == "text":
            memory = [f"{side.held[which] / 1e6:5.0f}" for side in (a, b) for which in (0, 1)]
        a.end()
        b.end()
    return "".join([*cells, *_files(folder, own, other), " ", *memory])


def _files(folder: Path, own: str, other: str) -> list[str]:
    """Return the megabytes of the text models' files, ours and theirs."""
    from llavakit_plugins.onnx.runtime.layout import DECODER, EMBEDDINGS, SMALL_CACHE, graph_file

    place, precision = exported(folder, own)
    names = (EMBEDDINGS, DECODER, SMALL_CACHE)
    graphs = [place / graph_file(graph, precision) for graph in names]
    mine = sum(path.stat().st_size for graph in graphs for path in (graph, Path(f"{graph}_data"))
               if path.exists())  # fmt: skip
    (yours,) = (folder / other).glob("model-*.gguf")
    return [f"{size / 1e6:6.0f}" for size in (mine, yours.stat().st_size)]


def abilities() -> str:
    """Return what this CPU can do that matters here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
    return ", ".join(flag for flag in known if flag in flags)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--pairs", nargs="+", default=[f"{a}:{b}" for a, b in PAIRS])
    arguments = parser.parse_args()
    place = tempfile.TemporaryDirectory()
    folder = arguments.keep or Path(place.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = build(folder)
    except RuntimeError as error:
        print(f"llama.cpp cannot be built here: {error}", file=sys.stderr)
        return 2
    write_models(folder, python, arguments.layers)
    draw_picture(folder / PICTURE)
    clock = "cpu" if arguments.cpu_time else "wall"
    of = f"{arguments.threads} threads, {arguments.rounds} rounds, {clock} time"
    print(f"CPU: {abilities()}; {of}; load {os.getloadavg()[0]:.1f}")
    print(f"{'':17}{'prompt, tokens/s':>23}{'decode, tokens/s':>23}{'image to token, s':>23}"
          f"{'files MB':>12}{'memory MB, peak: ours, theirs':>32}")  # fmt: skip
    for pair in arguments.pairs:
        own, _, other = pair.partition(":")
        line = measure(folder, python, (own, other), arguments.rounds, arguments.threads, clock)
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--quantise"]:
        quantise(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6],
              CLOCKS[sys.argv[7]])  # fmt: skip
    else:
        raise SystemExit(main())
