"""How a model is asked, whatever runs it: PyTorch or an exported graph. Imports no torch.

I images, T rows of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, Unpack

from llavakit.contracts.data import ImageSource
from llavakit.contracts.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SamplingOptions(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt: the fields of `Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where an answer ends. Raises ModelError for nonsense."""

    max_new_tokens: int = 64
    temperature: float = 0.0  #: 0 takes the likeliest token: greedy
    top_p: float = 1.0  #: sample among the likeliest tokens that together have this probability
    seed: int | None = None  #: None draws from entropy; used where `temperature` is above 0
    stop: Sequence[str] = ()  #: texts that end an answer, and do not belong to it

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ModelError("an empty text cannot stop an answer; leave it out of `stop`")
        warm = 0 <= self.temperature < float("inf")
        if self.max_new_tokens < 1 or not warm or not 0 < self.top_p <= 1:
            raise ModelError(
                f"cannot sample with max_new_tokens={self.max_new_tokens}, "
                f"temperature={self.temperature}, top_p={self.top_p}; use at least one new "
                "token, a temperature of 0 or more, and 0 < top_p <= 1"
            )


class Model(Protocol):
    """What `llavakit.load` returns: answers prompts with images."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or what stands for it."""

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Return the answer to a prompt, greedy by default.

        A prompt without `<image>` gets one for each image in front; a `raw` one is read as it is,
        without the template. The answer ends before any of the `stop` texts, or where it ends.
        """

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer, the end token included where it came."""

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the answer in pieces as it comes; together they are what `generate` returns."""

    def logits(self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False) -> Any:
        """Return logits `[T, V]`, float32, of every row of the spliced sequence."""


LlavaModel: TypeAlias = Any
"""A model in PyTorch, as steps and exporters are given one: `llavakit.LlavaModel`, which they may
annotate. It is a `Model` with the parts `vision`, `connector`, `language` and `template`."""
