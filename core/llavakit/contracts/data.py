"""What data is made of: samples of turns and images, and the symbolic context of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Union, runtime_checkable

from llavakit.contracts.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image
    from torch import Tensor

    from llavakit.contracts.sections import Section

IMAGE = "<image>"  #: Where an image goes in a turn's text (the original LLaVA's spelling).

Role = Literal["human", "gpt"]


@runtime_checkable
class ImageFile(Protocol):
    """A path, or what else reads an image's file when it is asked to; `str` says which it is."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Video:
    """A video's file, a folder of its frames, or the frames in order."""

    source: ImageSource | tuple[ImageSource, ...]


ImageSource = Union[ImageFile, Video, str, bytes, "Image", "npt.NDArray[np.uint8]", "Tensor"]
"""A file, a `file:` or `data:` address, an image file's bytes, or pixels: Pillow's, numpy's
`[H, W, 3]` of uint8, or a tensor `[3, H, W]` of uint8 or of floats from 0 to 1; or a video."""


class Turn(NamedTuple):
    """One turn of a conversation; `role` as in LLaVA's JSON."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation about images and videos, in the order of their `<image>` placeholders."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    kind: str = ""  #: What sort of response it teaches (conversation, detail, reasoning), if known.
    system: str | None = None  #: In place of the template's own system text; "": without any.
    rejected: str | None = None  #: A worse answer than the last one, where samples are preferences.

    def check(self, where: str = "") -> None:
        """Raise DataError for a sample that cannot be learned from.

        Roles alternate from a human turn, every text is valid Unicode, placeholders fit images.
        """
        who = f"sample `{self.id:.200}`{f' of {where}' if where else ''}"
        for number, turn in enumerate(self.turns):
            expected = ("human", "gpt")[number % 2]  # templates rely on it
            if turn.role != expected:
                raise DataError(
                    f"{who}: turn {number + 1} is from `{turn.role}`, expected `{expected}`; "
                    "turns must alternate and start with the human"
                )
            if is_cut(turn.text):
                raise DataError(
                    f"{who}: turn {number + 1} has half a character (a lone surrogate, as of an "
                    "emoji that was cut in two); fix or remove it"
                )
        if is_cut(self.system or "") or IMAGE in (self.system or ""):
            raise DataError(f"{who}: its system text has `{IMAGE}` or half a character; remove it")
        if not self.turns:
            raise DataError(f"{who} has no turns; remove it or give it a conversation")
        counts = [turn.text.count(IMAGE) for turn in self.turns]
        if any(counts[1::2]):
            raise DataError(f"{who}: an answer has `{IMAGE}`, which only a question may; remove it")
        marks, images = sum(counts), len(self.images)
        if marks != images:
            raise DataError(
                f"{who} has {images} image{'s' * (images != 1)} for {marks} `{IMAGE}` "
                f"placeholder{'s' * (marks != 1)}; each image needs exactly one"
            )


def is_cut(text: str) -> bool:
    """Say whether a text has a lone surrogate, as JSON may, which no tokenizer or service takes."""
    # UTF-8 has no form for them; that a text is ASCII is known without looking at it
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


@dataclass(frozen=True)
class Finding:
    """Something about a row of data that its owner should know."""

    sort: str  #: A word or two under which findings of one sort are counted.
    message: str
    stops: bool = True  #: Whether a training on the data would stop at it.


@dataclass(frozen=True)
class Inspected:
    """A row of a data set, looked at before any training."""

    id: str
    sample: Sample | None  #: None where the row cannot be used.
    findings: tuple[Finding, ...] = ()
    images: tuple[ImageSource, ...] = ()  #: The row's images, where known without a sample.
    read: float = 0.0  #: The share of the data read up to here.


@dataclass(frozen=True)
class Box:
    """One object of an image: top-left and bottom-right corners, each within 0..1."""

    category: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageContext:
    """What a text-only teacher is told of an image: captions and boxes (paper, section 3)."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  #: What else is known of the image.


ResponseKind = str  #: A generator may write others than the paper's.
RESPONSE_KINDS: tuple[ResponseKind, ...] = ("conversation", "detail", "reasoning")


@dataclass(frozen=True)
class Message:
    """One message of a chat completion."""

    role: Literal["system", "user", "assistant"]
    content: str
    images: tuple[ImageSource, ...] = ()  #: Of a user's message: shown before the text.


@dataclass(frozen=True)
class Reply:
    """What a chat model answered, and what is known of it."""

    text: str
    finish: str = "stop"  #: Or `length` (cut), `refusal`, `content_filter` (withheld).
    model: str = ""  #: Which model answered, as the service names it.
    input_tokens: int | None = None
    output_tokens: int | None = None
    usd: float | None = None  #: What it cost; None where no price is known.


@dataclass(frozen=True)
class Question:
    """One item of a benchmark."""

    id: str | int  #: As the file has it; joined with others as text.
    prompt: str
    images: tuple[ImageSource, ...] = ()
    truth: str = ""
    category: str = ""
    then: str = ""
    """What an answer must hold; where it does not, the model goes on from its answer and this."""


@dataclass(frozen=True)
class Score:
    """What a benchmark makes of answers."""

    metrics: Mapping[str, float]
    right: Sequence[bool | None]  #: One a question; None where it cannot be right by itself.
    sections: Sequence[Section] = ()  #: Tables for the report; none: the share of right answers.
    remarks: Sequence[str] = ()  #: One entry a question, such as a judge's review; or none at all.
