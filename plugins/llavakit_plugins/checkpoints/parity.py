"""Proves that an exported model is the same model: the same logits and the same greedy tokens.

T rows of a spliced prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from llavakit import LlavaError, LlavaModel, ModelError
from llavakit.contracts.data import IMAGE, ImageSource, Video

FloatArray = npt.NDArray[np.float32]

_TEXTS = (
    "Tell me of the sea, and of what lives in it.",
    f"{IMAGE}\nWhat is in the picture?",
    f"Here is {IMAGE}\nand here is {IMAGE}\nWhich of the two is brighter, and why?",
)
# A few tokens only: one logit that is rounded in another way may change all that follow.
_TOKENS = 8
_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed difference of logits; relative to the largest logit if that is above 1."""


class Reader(Protocol):
    """A model that was written and is read back by other code."""

    def logits(self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False) -> Any:
        """Return logits `[T, V]` of the spliced sequence, or more columns; an array or a tensor."""

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer."""


@dataclass(frozen=True)
class Case:
    """A prompt with the logits and the greedy tokens that the model itself gives."""

    text: str
    images: Sequence[ImageSource]
    raw: bool  #: Whether the prompt is read without the model's template.
    new_tokens: int  #: The longest answer that is compared.
    logits_TV: FloatArray
    tokens: Sequence[int]


@dataclass(frozen=True)
class Figures:
    """How close a reader is to the model."""

    largest: float  #: Largest absolute difference of a logit; NaN where shapes differ.
    relative: float  #: The same over the largest logit of the prompt, where that is above 1.
    mean: float  #: Mean absolute difference of the logits.
    agreement: float  #: Share of the rows whose most likely token is the same, 0 to 1.
    same_tokens: int  #: Greedy tokens before the first that differs.
    all_tokens: int
    worst: Case  #: The prompt with the largest relative difference.


def sample_images(count: int = 2, size: tuple[int, int] = (97, 61)) -> list[Image.Image]:
    """Return smooth images with some noise, always the same ones.

    Noise makes filters, crops and flips distinguishable; smooth areas keep the differences small.
    """
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        wide, high = size if number % 2 == 0 else size[::-1]
        grid = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(grid).resize((wide, high), Image.Resampling.BICUBIC))
        noise = draw.integers(-12, 13, smooth.shape)
        found.append(Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)))
    return found


def cases(
    model: LlavaModel, *, new_tokens: int = _TOKENS, raw: bool = False, videos: bool = False
) -> list[Case]:
    """Return prompts without an image, with one and with two: those that the model can read.

    With `videos` also one with a video. Raises ModelError if it can read none.
    """
    shown: list[tuple[str, list[ImageSource]]] = [
        (text, [*sample_images(text.count(IMAGE))]) for text in _TEXTS
    ]
    if videos:
        shown.append((_TEXTS[1], [Video(tuple(sample_images(3)[::2]))]))
    found = []
    for text, images in shown:
        try:
            length = model.prompt(text, images, raw=raw).length(model.visual_tokens)
        except LlavaError:  # the template takes no such prompt
            continue
        if length + new_tokens > model.language.max_length:
            continue
        logits_TV = _array(model.logits(text, images, raw=raw))
        tokens = model.generate_ids(text, images, max_new_tokens=new_tokens, raw=raw)
        found.append(Case(text, images, raw, new_tokens, logits_TV, tokens))
    if not found:
        raise ModelError(
            f"no prompt to prove the export with fits into the {model.language.max_length} tokens "
            "that the language model reads; give it a longer `max_length`"
        )
    return found


def compare(reader: Reader, tried: Sequence[Case]) -> Figures:
    """Return how close a reader is to the model on these prompts."""
    differences, relative, same, together, count = [], [], [], 0, 0
    for case in tried:
        logits_TV = _array(reader.logits(case.text, case.images, raw=case.raw))
        logits_TV = logits_TV[:, : case.logits_TV.shape[1]]  # a table may be padded to wider
        if logits_TV.shape != case.logits_TV.shape:
            # NaN and not an error, so that the caller's one check of limits refuses it, too
            logits_TV = np.full_like(case.logits_TV, np.nan)
        differences.append(np.abs(logits_TV - case.logits_TV))
        relative.append(float(differences[-1].max() / max(1.0, np.abs(case.logits_TV).max())))
        same.append(logits_TV.argmax(-1) == case.logits_TV.argmax(-1))
        tokens = reader.generate_ids(
            case.text, case.images, max_new_tokens=case.new_tokens, raw=case.raw
        )
        pairs = list(zip(tokens, case.tokens, strict=False))
        # behind the first that differs the two answer other prompts
        together += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        count += max(len(tokens), len(case.tokens))
    worst = int(np.argmax(relative))  # NaN counts as the largest
    return Figures(
        largest=float(np.max([difference.max() for difference in differences])),
        relative=relative[worst],
        mean=float(np.mean([difference.mean() for difference in differences])),
        agreement=float(np.concatenate(same).mean()),
        same_tokens=together,
        all_tokens=count,
        worst=tried[worst],
    )


def prove(
    model: LlavaModel, reader: Reader, folder: Path, *, videos: bool = False
) -> dict[str, Any]:
    """Return how much the two differ. Raises ModelError if it is more than rounding explains."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    tried = cases(model, videos=videos)
    figures = compare(reader, tried)
    if not figures.relative <= max(_LIMITS.get(dtype, 0.0) for dtype in dtypes):  # NaN, too
        raise ModelError(
            f"what was written to {folder} gives other logits than the model "
            f"({figures.largest:.2g} apart for a prompt with {len(figures.worst.images)} images or "
            "videos), so nothing is left there; report this, with the model.toml"
        )
    # in half precision two logits may be equal in one reader and not in the other
    if dtypes == {torch.float32} and figures.same_tokens < figures.all_tokens:
        raise ModelError(
            f"what was written to {folder} answers with other tokens than the model, so nothing is "
            "left there; report this, with the model.toml"
        )
    return {
        "prompts": len(tried),
        "largest_logit_difference": figures.largest,
        "greedy_tokens_equal": f"{figures.same_tokens} of {figures.all_tokens}",
    }


def _array(logits: Any) -> FloatArray:
    array: FloatArray = logits.cpu().numpy() if isinstance(logits, torch.Tensor) else logits
    return array
