"""Answers on a CPU: `LlavaModel` against transformers' LLaVA with the same weights.

    python tests/benchmarks/decode_cpu.py [--rounds 5] [--layers 12] [--new 32] [--batches 1,8]
        [--products torch,onednn]

CLIP B/16 and a Llama of 12 layers x 768 (fewer with --layers), random weights. Prompts of one image
and unequal text, which transformers pads on the left. Greedy, one thread, CPU time, the two in
alternation, medians of paired ratios. Prefill is the time to the first token, images included;
decode is the rest, and `bandwidth` the bytes of weights and cache that a step reads, a second,
over the rate at which one thread reads memory in the same round. `--products onednn` lets our
linear layers multiply by it. Exits with 1 where the answers
differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.startup import machine
from tests.core.peer import make_pair, their_inputs

from llavakit import LlavaModel
from llavakit.contracts.model import Sampling
from llavakit_plugins.huggingface.products import Products

VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "projection_dim": 512,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 32000, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 3,
}  # fmt: skip
LIMITS = {1: 1.1, 8: 1.3}  # of the ratio in decoding, by prompts at once
BANDWIDTH = 0.92  # at one prompt; what several ask of a core is products
QUESTION = "what colour is the circle in the picture ? what shape is the square ?"
Answer = Callable[[int], list[list[int]]]


def prompts(count: int) -> list[str]:
    """Return prompts of one image and 7 to 14 words."""
    return [" ".join(["<image>", *QUESTION.split()[number % 8 :]]) for number in range(count)]


def ours_of(model: LlavaModel, texts: Sequence[str], pixels: Tensor) -> Answer:
    """Return our way to answer the prompts with so many tokens."""

    def answer(new: int) -> list[list[int]]:
        asked = [(text, [None]) for text in texts]
        return model.answer_ids(asked, Sampling(new), raw=True, pixels_IHW=pixels)  # type: ignore[arg-type]

    return answer


def theirs_of(peer: Any, model: LlavaModel, texts: Sequence[str], pixels: Tensor) -> Answer:
    """Return transformers' way, prompts padded on the left."""
    rows = [their_inputs(model, text, None)["input_ids"][0] for text in texts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), LANGUAGE["pad_token_id"])
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1

    def answer(new: int) -> list[list[int]]:
        found = peer.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, do_sample=False,
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
        answers: list[list[int]] = found[:, longest:].tolist()
        return answers

    return answer


def seconds(answer: Answer, new: int) -> float:
    begun = time.process_time()
    answer(new)
    return time.process_time() - begun


def memory_rate(megabytes: int = 256) -> float:
    """Return the bytes that a thread reads a second of CPU time, at best, of a matrix that no cache
    holds: in a sum, or times a vector."""
    values = torch.ones(megabytes * 2**18 // 4096, 4096)
    vector = torch.ones(4096)
    found = []
    for read in (torch.sum, partial(torch.mv, vec=vector)) * 3:
        begun = time.process_time()
        read(values)
        found.append(values.nbytes / (time.process_time() - begun))
    return max(found)


def step_bytes(model: LlavaModel, texts: Sequence[str], new: int) -> float:
    """Return the mean bytes that a step of decoding reads: each weight once, and what the cache
    holds of each prompt halfway."""
    language = model.language
    weights = sum(p.nbytes for p in language.parameters())
    table = language.embedding_VE
    if table is not None and table is not language.head.weight:
        weights -= table.nbytes  # of which a step reads a row
    layers, heads, width = language.cache_shape()
    lengths = [
        len(their_inputs(model, text, None)["input_ids"][0]) + (new + 1) / 2 for text in texts
    ]
    return weights + 2 * 4 * layers * heads * width * sum(lengths)


Rounds = dict[str, list[tuple[float, float]]]


def compare(ours: Answer, theirs: Answer, new: int, rounds: int) -> Rounds:
    """Return the seconds of ours and theirs to the first token, and for each one behind it; and
    those of our steps beside the bytes a second that memory gives."""
    found: Rounds = {"prefill": [], "decode": [], "memory": []}
    for number in range(rounds):
        pair = (ours, theirs) if number % 2 else (theirs, ours)
        first = {answer: seconds(answer, 1) for answer in pair}
        whole = {answer: seconds(answer, new + 1) for answer in pair}
        found["prefill"].append((first[ours], first[theirs]))
        rest = {answer: (whole[answer] - first[answer]) / new for answer in pair}
        found["decode"].append((rest[ours], rest[theirs]))
        found["memory"].append((rest[ours], memory_rate()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--products", default="torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [table(products, arguments) for products in arguments.products.split(",")]
    return 0 if all(found) else 1


def table(products: Products, arguments: argparse.Namespace) -> bool:
    """Print the rows of one way to multiply; return whether the answers are the peer's."""
    layers = {"num_hidden_layers": arguments.layers}
    peer, model = make_pair(VISION | layers, LANGUAGE | layers, products=products)
    model.language.tokenizer.eos_token = None  # random weights end an answer at any time
    draw = torch.Generator().manual_seed(0)
    same = True
    print(
        f"{machine()}, torch {torch.__version__}, products by {products}; one thread reads "
        f"{memory_rate() / 1e9:.1f} GB/s"
    )
    print(
        f"{'':18}{'ours ms':>9}{'peer ms':>10}{'ratio':>8}{'goal':>8}{'bandwidth':>11}{'goal':>6}"
    )
    for count in map(int, arguments.batches.split(",")):
        pixels = torch.randn(count, 3, 224, 224, generator=draw)
        texts = prompts(count)
        ours, theirs = ours_of(model, texts, pixels), theirs_of(peer, model, texts, pixels)
        same &= ours(8) == theirs(8)  # warms both up, too
        found = compare(ours, theirs, arguments.new, arguments.rounds)
        size = step_bytes(model, texts, arguments.new)
        used = statistics.median(size / (step * rate) for step, rate in found.pop("memory"))
        for what, pairs in found.items():
            mine, yours = (1000 * statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(other / own for own, other in pairs)
            line = f"batch {count}, {what:8}{mine:>9.1f}{yours:>10.1f}{ratio:>7.2f}x"
            if what == "decode":
                line += f"{LIMITS[count]:7.2f}x" if count in LIMITS else f"{'':8}"
                line += f"{used:11.2f}" + (f"{BANDWIDTH:6.2f}" if count == 1 else "")
            print(line, flush=True)
    print(f"the same tokens: {same}")
    return same


if __name__ == "__main__":
    raise SystemExit(main())
