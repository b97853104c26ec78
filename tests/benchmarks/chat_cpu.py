"""The fifth turn of a dialogue on a CPU: with the cache of the turns before, and read all anew.

    python tests/benchmarks/chat_cpu.py [--rounds 5] [--layers 12] [--new 24] [--onnx]

CLIP B/16 and a Llama of 12 layers x 768 (fewer with --layers), random weights; four turns, the
first with an image, answers of --new tokens, then a fifth question. Time to its first token, the
image prepared and hashed included, CPU time of one thread, the two in alternation, medians and the
median of the paired ratios. With --onnx the exported folder too, run by onnxruntime. Exits with 1
where the tokens of the two answers differ, or the ratio is above 0.25.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.decode_cpu import LANGUAGE, VISION
from tests.core.peer import make_pair

from llavakit import Prefixes, PromptTemplate, Registry
from llavakit.contracts.component import Use

LIMIT = 0.25
QUESTIONS = (
    "what colour is the circle in the picture ? what shape is the square ?",
    "is it a red circle or a blue square ? what is in the picture ?",
    "what shape is the blue circle in the picture ? is it red ?",
    "a red square is in the picture . what colour is the circle ?",
    "what is it ?",
)


def dialogue(model: Any, new: int) -> list[Any]:
    """Return four turns with the model's answers, and the fifth question."""
    drawn = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    messages: list[Any] = []
    for number, question in enumerate(QUESTIONS):
        image = [{"type": "image", "image": Image.fromarray(drawn)}] if not number else []
        content = [*image, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if question != QUESTIONS[-1]:
            answer = model.generate(messages, max_new_tokens=new)
            messages.append({"role": "assistant", "content": answer or "."})
    return messages


def first_token(model: Any, messages: list[Any]) -> float:
    begun = time.process_time()
    model.generate_ids(messages, max_new_tokens=1)
    return time.process_time() - begun


def measure(name: str, model: Any, rounds: int, new: int) -> bool:
    model.prefixes = Prefixes()
    messages = dialogue(model, new)
    (kept,) = model.prefixes.kept  # as it is once the fourth answer was given
    rows = model.prompt(messages, ()).length(model.visual_tokens)
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        model.prefixes = Prefixes(kept=[kept])
        ours = first_token(model, messages)
        model.prefixes = Prefixes(0)
        times.append((ours, first_token(model, messages)))
    anew = model.generate_ids(messages, max_new_tokens=new)
    model.prefixes = Prefixes(kept=[kept])
    same = model.generate_ids(messages, max_new_tokens=new) == anew
    ratio = statistics.median(ours / whole for ours, whole in times[1:])  # the first warms up
    cached, whole = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
    print(
        f"{name:<10} {rows:5} {cached:10.1f} {whole:10.1f} {ratio:8.3f} {LIMIT:6} "
        f"{'equal' if same else 'DIFFERENT'}"
    )
    return same and ratio <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--onnx", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    language = {**LANGUAGE, "num_hidden_layers": arguments.layers}
    model = make_pair(VISION, language)[1].eval()
    model.template = Registry.installed().build(Use[PromptTemplate](use="vicuna_v1"))
    print("model       rows  cached ms    anew ms    ratio  limit tokens")
    good = measure("PyTorch", model, arguments.rounds, arguments.new)
    if arguments.onnx:
        from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
        from llavakit_plugins.onnx.runtime import load

        with tempfile.TemporaryDirectory() as folder:
            Onnx(OnnxOptions()).export(model, Path(folder) / "out")
            exported = load(Path(folder) / "out", threads=1)
            good &= measure("ONNX", exported, arguments.rounds, arguments.new)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
