"""Proves that an exported folder is the same model: the same logits and the same greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from llavakit import LlavaError, LlavaModel, ModelError
from llavakit.contracts.data import IMAGE, ImageSource

_TOKENS = 8
_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed difference of logits; relative to the largest logit if that is above 1."""


class Reader(Protocol):
    """A model that was written and is read back by other code."""

    def logits(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False
    ) -> Tensor:
        """Return logits `[T, V]` of the spliced sequence."""

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer."""


def sample_image() -> Image.Image:
    """Return an image that is not square and has no symmetry, so that flips and crops show."""
    across = Image.linear_gradient("L").resize((52, 40)).rotate(30)
    return Image.merge("RGB", (across, across.transpose(Image.Transpose.ROTATE_180), across))


def prompts() -> list[tuple[str, list[ImageSource]]]:
    """Return the prompts of the proof: without an image, with one, and with two."""
    return [
        ("What is the answer?", []),
        (f"{IMAGE}\nWhat is in the picture?", [sample_image()]),
        (
            f"{IMAGE}{IMAGE}\nWhich is larger?",
            [sample_image(), sample_image().rotate(90, expand=True)],
        ),
    ]


def prove(model: LlavaModel, reader: Reader, folder: Path) -> dict[str, Any]:
    """Return how much the two differ. Raises ModelError if it is more than rounding explains."""
    furthest, same, total = 0.0, 0, 0
    dtypes = {parameter.dtype for parameter in model.parameters()}
    limit = max(_LIMITS.get(dtype, 0.0) for dtype in dtypes)
    exact = dtypes == {torch.float32}
    cases = [item for item in prompts() if _fits(model, *item)]
    if not cases:
        raise ModelError(
            f"the model reads {model.language.max_length} tokens, too few to ask it anything, so "
            "nothing can be proven of an export"
        )
    for prompt, images in cases:
        expected = model.logits(prompt, images)
        found = reader.logits(prompt, images)[:, : expected.shape[1]]
        away = (found - expected).abs().max().item() if found.shape == expected.shape else torch.nan
        if not away <= limit * max(1.0, expected.abs().max().item()):
            raise ModelError(
                f"what was written to {folder} gives other logits than the model ({away:.2g} "
                f"apart for a prompt with {len(images)} images), so nothing is left there; report "
                "this, with the model.toml"
            )
        furthest = max(furthest, away)
        mine = model.generate_ids(prompt, images, max_new_tokens=_TOKENS)
        yours = reader.generate_ids(prompt, images, max_new_tokens=_TOKENS)
        same += sum(a == b for a, b in zip(mine, yours, strict=False))
        total += max(len(mine), len(yours))
        if exact and mine != yours:
            raise ModelError(
                f"what was written to {folder} answers with other tokens than the model, so "
                "nothing is left there; report this, with the model.toml"
            )
    return {
        "prompts": len(cases),
        "largest_logit_difference": furthest,
        "greedy_tokens_equal": f"{same} of {total}",
    }


def _fits(model: LlavaModel, prompt: str, images: Sequence[ImageSource]) -> bool:
    """Say whether the model reads so many images, and its template such a prompt."""
    try:
        length = model.prompt(prompt, images).length(model.visual_tokens)
    except LlavaError:
        return False
    return length + _TOKENS <= model.language.max_length
