"""A model that has learned to see answers as well in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from tests.plugins.onnx_models import HEADS_OF_16, make_model

from llavakit import LlavaModel, Sample, Turn, encode, pack
from llavakit.contracts.model import Sampling

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.runtime import OnnxModel, load
from llavakit_plugins.onnx.runtime.layout import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "q8", "q4")
QUESTION = "what colour is it ?"
COLOURS = {
    "red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "yellow": (220, 210, 40),
    "black": (30, 30, 30), "white": (235, 235, 235), "purple": (140, 40, 190),
    "orange": (240, 140, 30),
}  # fmt: skip


class Seen(NamedTuple):
    images: list[Image.Image]
    colours: list[str]


def draw_squares(count: int, seed: int) -> Seen:
    """Return grey pictures with a square of one colour, anywhere, all of them noisy."""
    draw = np.random.default_rng(seed)
    seen = Seen([], [])
    for _ in range(count):
        pixels_HWC = np.full((32, 32, 3), 128.0)
        name = str(draw.choice(list(COLOURS)))
        top, left = draw.integers(0, 20, 2)
        pixels_HWC[top : top + 12, left : left + 12] = COLOURS[name] + draw.normal(0, 12, 3)
        pixels_HWC += draw.normal(0, 12, pixels_HWC.shape)
        pixels: npt.NDArray[np.uint8] = pixels_HWC.clip(0, 255).astype(np.uint8)
        seen.images.append(Image.fromarray(pixels))
        seen.colours.append(name)
    return seen


@pytest.fixture(scope="module")
def trained() -> LlavaModel:
    """A LLaVA with all its weights trained, for some seconds, to name colours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model({**HEADS_OF_16, "hidden_size": 128})
        model.language.tokenizer.add_tokens(list(COLOURS))
        seen = draw_squares(640, seed=0)
        pixels_IHW = model.prepare(seen.images)
        assert pixels_IHW is not None
        samples = [
            encode(
                Sample("", (Turn("human", f"<image>\n{QUESTION}"), Turn("gpt", name)), ("",)),
                model.template,
                model.language.tokenizer,
            )
            for name in seen.colours
        ]
        steps, draw = 160, torch.Generator().manual_seed(0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        model.train()
        for _ in range(steps):
            chosen = torch.randint(len(samples), (16,), generator=draw)
            batch = pack([samples[i] for i in chosen.tolist()], range(16), model.visual_tokens)
            loss = model.loss(batch, model.features(pixels_IHW[chosen])) / len(batch.targets_M)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


def accuracy(model: LlavaModel | OnnxModel, seen: Seen) -> float:
    """Return the share of rightly named colours, each picture asked about alone."""
    prompts = [(QUESTION, [image]) for image in seen.images]
    answers = [model.answer([prompt], Sampling(3))[0] for prompt in prompts]
    return sum(a == b for a, b in zip(answers, seen.colours, strict=True)) / len(answers)


def test_every_precision_answers_within_half_a_point(trained: LlavaModel, tmp_path: Path) -> None:
    """At most 2 of 400 answers more may be wrong; the likeliest token agrees, as the report says.

    The same weights rounded to 2 bits lose far more, so that the questions do tell.
    """
    options = OnnxOptions(precisions=PRECISIONS, tolerance=1e-3)
    figures = Onnx(options).export(trained, tmp_path / "out")
    seen = draw_squares(400, seed=1)
    exact = accuracy(trained, seen)
    assert exact >= 0.95
    for precision in PRECISIONS:
        found = accuracy(load(tmp_path / "out", precision=precision, threads=1), seen)
        assert abs(found - exact) <= 0.005, precision
        assert figures[f"{precision} agreement"] >= 0.9, precision
    with torch.no_grad():
        for weight in trained.language.parameters():
            if weight.ndim == 2:
                step = weight.abs().amax(1, keepdim=True)
                weight.copy_((weight / step).round() * step)
    assert accuracy(trained, seen) < exact - 0.05
