"""Draws scenes for the demo: handwritten digits on coloured canvases, annotated like COCO.

The digits are the UCI optical digits that scikit-learn contains (8 x 8 grey values, 1,797 glyphs).
A scene is a square of 3 x 3 cells. One to three of the four cells in the middle of an edge hold a
glyph, with a random size and a small random offset.

Scenes come in families of eight. A family shares canvas, positions and colours; its digits run
through a product of candidates. In one contrastive batch they are hard negatives of each other:
only a model that reads every digit can tell them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from llavakit import ImageContext, LlavaError
from llavakit.contracts.data import Box

SIDE = 72
"""Edge of a scene in pixels."""
CELL = SIDE // 3
FAMILY = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = {"top": (1, 0), "left": (0, 1), "right": (2, 1), "bottom": (1, 2)}
"""Column and row of each position on the canvas, in reading order."""
COLOURS = {
    "red": (200, 20, 30),
    "green": (0, 120, 40),
    "blue": (30, 50, 210),
    "black": (20, 20, 20),
}
CANVASES = {
    "white": (255, 255, 255),
    "yellow": (255, 240, 150),
    "pink": (255, 205, 220),
    "grey": (205, 205, 205),
}
_SIZES = (18, 20, 22)  # edges of a glyph in pixels
_JITTER = 2  # largest offset in pixels
_CANDIDATES = ((8,), (4, 2), (2, 2, 2))  # digits to choose from; each row's product is FAMILY
_HELD_OUT = 5  # every fifth glyph is held out

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene."""

    place: str
    value: int
    colour: str
    glyph: int
    """Which of the 1,797 handwritten ones."""
    corners: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels."""

    @property
    def named(self) -> str:
        """Colour and value in words."""
        return f"{self.colour} {WORDS[self.value]}"


@dataclass(frozen=True)
class Scene:
    """The content of one image."""

    canvas: str
    digits: tuple[Digit, ...]
    """In reading order."""
    squares: int = 1
    """Its edge in squares of SIDE pixels."""

    @property
    def side(self) -> int:
        """Its edge in pixels."""
        return SIDE * self.squares

    def draw(self) -> Image.Image:
        """Return the image, side x side pixels, RGB."""
        masks, _ = _glyphs()
        pixels = np.empty((self.side, self.side, 3), np.float32)
        pixels[:] = CANVASES[self.canvas]
        for digit in self.digits:
            left, top, right, bottom = digit.corners
            alpha = masks[right - left][digit.glyph][:, :, None]
            under = pixels[top:bottom, left:right]
            under += alpha * (np.array(COLOURS[digit.colour], np.float32) - under)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def context(self, identity: str, image: str) -> ImageContext:
        """Return captions and boxes, from which a teacher writes data."""
        boxes = tuple(
            Box(WORDS[digit.value], tuple(round(value / self.side, 3) for value in digit.corners))  # type: ignore[arg-type]
            for digit in self.digits
        )
        return ImageContext(identity, image, tuple(self.captions()), boxes)

    def captions(self) -> Iterator[str]:
        """Yield five captions, as many as COCO has; each names everything.

        Each names the position first and then the digit there. A small language model learns this
        order most easily: the answer follows the position that a question names.
        """
        placed = " and ".join(f"at the {d.place} a {d.named}" for d in self.digits)
        shown = " and ".join(f"the {d.place} shows a {d.named}" for d in self.digits)
        number = WORDS[len(self.digits)].capitalize()
        noun = "digit" if len(self.digits) == 1 else "digits"
        yield f"{placed.capitalize()} on a {self.canvas} canvas."
        yield f"A {self.canvas} canvas, {placed}."
        yield f"{number} {noun} on a {self.canvas} canvas: {placed}."
        yield f"On {self.canvas}, {shown}."
        yield f"{shown.capitalize()}. The canvas is {self.canvas}."


def compose(
    split: Split, families: int, seed: int, most: int = 3, squares: int = 1
) -> Iterator[Scene]:
    """Yield scenes with at most `most` digits, family by family.

    With 3 `squares` a scene is three times as wide and high, and its digits are as small as ever:
    each cell is a scene of the usual size, with the digit at one of its own four positions.
    The splits share no glyph, so that a held-out scene shows handwriting that was never trained on.
    Raises LlavaError if scikit-learn is not installed.
    """
    _, values = _glyphs()
    held = np.arange(len(values)) % _HELD_OUT == _HELD_OUT - 1
    own = held if split == "test" else ~held
    glyphs = [np.flatnonzero(own & (values == value)) for value in range(10)]
    # with split and size in the seed, so that the files of a run have nothing in common
    draw = np.random.default_rng([seed, split == "test", most])
    for _ in range(families):
        count = int(draw.integers(1, most + 1))
        places = [list(PLACES)[place] for place in sorted(draw.permutation(4)[:count].tolist())]
        colours = [str(colour) for colour in draw.choice(list(COLOURS), count)]
        canvas = str(draw.choice(list(CANVASES)))
        sizes = draw.permutation(_CANDIDATES[count - 1])
        pools = [draw.permutation(10)[:size].tolist() for size in sizes]
        members = list(itertools.product(*pools))
        # in random order, as a count that is no multiple of eight cuts the last family
        for member in draw.permutation(len(members)).tolist():
            digits = [
                _place(place, value, colour, glyphs[value], draw, squares)
                for place, value, colour in zip(places, members[member], colours, strict=True)
            ]
            yield Scene(canvas, tuple(digits), squares)


def _place(
    place: str,
    value: int,
    colour: str,
    glyphs: Sequence[int] | npt.NDArray[np.int64],
    draw: np.random.Generator,
    squares: int,
) -> Digit:
    size = int(draw.choice(_SIZES))
    room = CELL - size
    low, high = max(0, room // 2 - _JITTER), min(room, room // 2 + _JITTER)
    x, y = (int(offset) for offset in draw.integers(low, high + 1, 2))
    column, row = PLACES[place]
    left, top = CELL * column * squares + x, CELL * row * squares + y
    if squares > 1:
        within = list(PLACES.values())[int(draw.integers(4))]
        left, top = (edge + CELL * cell for edge, cell in zip((left, top), within, strict=True))
    corners = (left, top, left + size, top + size)
    return Digit(place, value, colour, int(draw.choice(glyphs)), corners)


@cache
def _glyphs() -> tuple[dict[int, npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """Return the glyphs as masks `[1797, size, size]` of 0 to 1, by size, and the digit of each."""
    images, values = _digits()
    masks = {
        size: np.stack(
            [
                np.asarray(
                    # the grey values are 0 to 16; 15.9 keeps 16 below 256
                    Image.fromarray((glyph * 15.9).astype(np.uint8)).resize(
                        (size, size), Image.Resampling.BICUBIC
                    ),
                    dtype=np.float32,
                )
                / np.float32(255)
                for glyph in images
            ]
        )
        for size in _SIZES
    }
    return masks, values


def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return scikit-learn's glyphs `[1797, 8, 8]`, and the digit of each."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise LlavaError(
            "the scenes are drawn with scikit-learn's handwritten digits; install them with "
            "`pip install 'llavakit[demo]'`"
        )
    # its `load_digits` reads this file, but imports scipy and pandas first
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.asarray(data.images), np.asarray(data.target, dtype=np.int64)
