"""How a model is asked, whatever runs it: PyTorch or an exported graph. Imports no torch.

I images, T rows of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, Unpack

from llavakit.contracts.data import ImageSource, Sample
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
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logprobs: int | None
    n: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where an answer ends. Raises ModelError for nonsense."""

    max_new_tokens: int = 64
    temperature: float = 0.0  #: 0 takes the likeliest token: greedy
    top_p: float = 1.0  #: sample among the likeliest tokens that together have this probability
    seed: int | None = None  #: None draws from entropy; used where `temperature` is above 0
    stop: Sequence[str] = ()  #: texts that end an answer, and do not belong to it
    top_k: int = 0  #: sample among so many of the likeliest tokens; 0: all
    min_p: float = 0.0  #: sample among tokens of this share of the likeliest's probability, or more
    repetition_penalty: float = 1.0  #: divides what was read or written (arXiv 1909.05858)
    frequency_penalty: float = 0.0  #: taken from a token's logit each time it was written
    presence_penalty: float = 0.0  #: taken once from that of every token that was written
    logprobs: int | None = None  #: tell each token's probability, and the so many likeliest ones'
    n: int = 1  #: answers to each prompt, each drawn by itself

    def __post_init__(self) -> None:
        stops = self.stop if isinstance(self.stop, list | tuple) else ("",)
        if not all(isinstance(text, str) and text for text in stops):
            raise ModelError("`stop` is a list of texts; an empty text stops none: leave it out")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            known = isinstance(value, Integral if isinstance(low, int) else Real)
            if not (value is None and name in _NONE) and not (known and low <= value <= high):
                raise ModelError(
                    f"cannot sample with {name}={value!r:.80}; use {low:g} to {high:g}"
                )


_NONE = ("seed", "logprobs")
_RANGES = {  # whole numbers have whole bounds
    "max_new_tokens": (1, 10**9), "temperature": (0.0, 1e9), "top_p": (1e-9, 1), "min_p": (0.0, 1),
    "top_k": (0, 10**9), "repetition_penalty": (1e-9, 1e9), "frequency_penalty": (-1e9, 1e9),
    "presence_penalty": (-1e9, 1e9), "logprobs": (0, 10**9), "n": (1, 10**9),
    "seed": (-(10**30), 10**30),
}  # fmt: skip

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: each message has a `role` (system, user, assistant) and a `content`, a text or a
list of parts, `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`."""
Images: TypeAlias = Sequence[ImageSource]
Asked: TypeAlias = str | Messages | Sample  #: A prompt, or a conversation that awaits an answer.


class Model(Protocol):
    """What `llavakit.load` returns: answers prompts with images."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or what stands for it."""

    def generate(
        self,
        prompt: Asked,
        images: Images = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Return the answer to a prompt, greedy by default.

        A prompt without `<image>` gets one for each image in front; a `raw` one is read as it is,
        without the template. The answer ends before any of the `stop` texts, or where it ends.
        """

    def generate_ids(
        self, prompt: Asked, images: Images = (), *, max_new_tokens: int = 64, raw: bool = False
    ) -> list[int]:
        """Return the new tokens of a greedy answer, the end token included where it came."""

    def stream(
        self,
        prompt: Asked,
        images: Images = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the answer in pieces as it comes; together they are what `generate` returns."""

    def logits(self, prompt: Asked, images: Images = (), *, raw: bool = False) -> Any:
        """Return logits `[T, V]`, float32, of every row of the spliced sequence."""


LlavaModel: TypeAlias = Any
"""A model in PyTorch, as steps and exporters are given one: `llavakit.LlavaModel`, which they may
annotate. It is a `Model` with the parts `vision`, `connector`, `language` and `template`."""
