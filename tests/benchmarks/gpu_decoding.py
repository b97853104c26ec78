"""Answers of a 7B in bfloat16, beside transformers' generate: a section of gpu.py.

Random weights that both share, prompts of one image and a few words, greedy. Prefill is the time
to the first token, image included; decode is each one behind it. One token cannot take less time
than its weights take to be read, which is the limit here; a prompt, less than its products take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tests.benchmarks.gpu_session import DEVICE, DRY, Session, profiled, release
from tests.benchmarks.gpu_training import SEVEN, STAGE_2, TINY, make_pair
from tests.conftest import make_tokenizer
from tests.core.peer import their_inputs
from torch import Tensor

from llavakit import LlavaModel
from llavakit.contracts.model import Sampling
from llavakit_plugins.training.work import work_of

QUESTION = "what colour is the circle in the picture ? what shape is the square ?"
Answer = Callable[[int], list[list[int]]]


def decode(session: Session) -> None:
    """Batches of 1 and 32."""
    case = TINY[1] if DRY else replace(STAGE_2, language=SEVEN, weights=torch.bfloat16)
    theirs, ours = make_pair(case)
    for model in (theirs, ours):
        model.requires_grad_(False).eval()
    half = torch.float32 if DRY else torch.bfloat16
    ours.connector.to(half)  # which is theirs, too
    theirs.model.multi_modal_projector.to(half)
    ours.language.tokenizer = make_tokenizer()
    ours.language.tokenizer.eos_token = None  # random weights end an answer at any time
    theirs.generation_config.eos_token_id = None
    language = ours.language
    size = sum(p.numel() * p.element_size() for p in language.parameters())
    table = language.embedding_VE
    size -= 0 if table is None else table.numel() * table.element_size()  # read by rows
    new = 6 if DRY else 128
    for count in (1, 2) if DRY else (1, 32):
        if not session.time_for(f"batch {count}", 0 if DRY else 12):
            break
        _measure(session, ours, theirs, case, count, new, size)
        release()


def _measure(
    session: Session,
    ours: LlavaModel,
    theirs: Any,
    case: Any,
    count: int,
    new: int,
    size: int,
) -> None:
    edge = case.vision["image_size"]
    pixels = torch.randn(count, 3, edge, edge, device=DEVICE)
    pixels = pixels.to(next(ours.vision.parameters()).dtype)
    texts = [" ".join(["<image>", *QUESTION.split()[n % 8 :]]) for n in range(count)]
    answers = {
        "ours": _ours(ours, texts, pixels),
        "transformers": _theirs(theirs, ours, texts, pixels),
    }
    first: dict[str, list[list[int]]] = {}
    times: dict[str, tuple[float, float]] = {}
    rows = [their_inputs(ours, text, None)["input_ids"].shape[1] for text in texts]
    G = case.language.get("num_key_value_heads", case.language["num_attention_heads"])
    width = case.language["hidden_size"] // case.language["num_attention_heads"]
    cached = 4 * case.language["num_hidden_layers"] * G * width * sum(n + new // 2 for n in rows)
    work = work_of(ours, ("connector",)).of(count, count * ours.visual_tokens, rows, count)
    work *= 0.5  # forward alone, of what is forward and backward there
    for name, answer in answers.items():
        first[name] = answer(4)  # warms it up
        prefill = statistics.median(_seconds(answer, 1) for _ in range(3))
        steps = new if name == "ours" else new // 4  # theirs are all alike
        step = (_seconds(answer, steps + 1) - prefill) / steps
        times[name] = prefill, step
        session.row(
            "decode", batch=count, way=name, prefill_ms=prefill * 1e3, step_ms=step * 1e3,
            tokens_per_s=count / step, of_memory=(size + cached) / session.bytes / step,
            prefill_of_products=work / session.flops / prefill,
        )  # fmt: skip
    _profile(session, answers["ours"], count)
    same = sum(
        a == b
        for x, y in zip(first["ours"], first["transformers"], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    session.row("decode: same", batch=count, same=same, of=4 * count)
    mine, other = times["ours"], times["transformers"]
    share = (size + cached) / session.bytes / mine[1]
    session.goal("decode", f"batch {count}, of the memory's limit", 0.0 if DRY else 0.6, share)
    wanted = 2.0 if count == 1 and not DRY else 0.0
    session.goal("decode", f"batch {count}, transformers / ours", wanted, other[1] / mine[1])
    session.say(
        f"decode batch {count}: {count / mine[1]:.1f} tokens/s, theirs {count / other[1]:.1f}; "
        f"prefill {mine[0] * 1e3:.1f} ms, theirs {other[0] * 1e3:.1f}; {same}/{4 * count} the same"
    )


def _profile(session: Session, answer: Answer, count: int) -> None:
    """Which kernels the time of an answer goes to, and how long the device waits for the host."""
    found = profiled(lambda: answer(9), rows=45)
    session.say(
        f"decode batch {count}, 9 tokens: {found.seconds * 1e3:.0f} ms under the profiler, device "
        f"busy {found.busy * 1e3:.0f} ms, {found.launches} launches"
    )
    session.text("decode.txt", f"{count}\n{found.table}")


def _seconds(answer: Answer, new: int) -> float:
    begun = time.perf_counter()
    answer(new)  # its tokens are on the host then
    return time.perf_counter() - begun


def _ours(model: LlavaModel, texts: list[str], pixels: Tensor) -> Answer:
    asked: Any = [(text, [None]) for text in texts]

    def answer(new: int) -> list[list[int]]:
        return model.answer_ids(asked, Sampling(new), raw=True, pixels_IHW=pixels)

    return answer


def _theirs(peer: Any, model: LlavaModel, texts: list[str], pixels: Tensor) -> Answer:
    """Prompts padded on the left, as it wants them."""
    rows = [their_inputs(model, text, None)["input_ids"][0] for text in texts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), 3)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    given = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}

    def answer(new: int) -> list[list[int]]:
        found = peer.generate(
            **given, pixel_values=pixels, do_sample=False, max_new_tokens=new,
            min_new_tokens=new, pad_token_id=3,
        )  # fmt: skip
        answers: list[list[int]] = found[:, longest:].tolist()
        return answers

    return answer
