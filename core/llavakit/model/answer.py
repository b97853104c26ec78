"""Asking a model: what is the same whatever runs it, PyTorch or an exported graph. Without torch.

I images, T rows of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, Unpack

import numpy as np

from llavakit.contracts.data import IMAGE, Sample
from llavakit.contracts.errors import ModelError
from llavakit.contracts.interfaces import Segment
from llavakit.contracts.model import Asked, Images, Sampling, SamplingOptions
from llavakit.model.sampling import Token
from llavakit.stream.detokenise import AnswerText, decode, special_stops
from llavakit.stream.encode import Encoded, tokenise
from llavakit.stream.images import Views
from llavakit.stream.messages import read_asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = tuple[Asked, Images]  #: What is asked, with its images.
Pixels = TypeVar("Pixels")  #: Prepared images `[I, 3, H, W]`: a tensor, or an array of numpy.


@dataclass(frozen=True)
class Answer:
    """An answer with its tokens, the end token included where it came."""

    text: str
    tokens: tuple[Token, ...]
    finish: Literal["stop", "length"]  #: `length`: cut, by `max_new_tokens` or the model's limit.


class Answering(ABC, Generic[Pixels]):
    """Answers prompts with images. A runtime says how they are read and how tokens are written."""

    upright: bool = False  #: Whether images are turned as a camera noted; the original does not.

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or what stands for it."""

    @property
    @abstractmethod
    def stops(self) -> Sequence[str]:
        """The template's texts that end an answer, besides the end tokens."""

    @property
    @abstractmethod
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""

    @property
    @abstractmethod
    def views(self) -> Views:
        """How images become views and rows."""

    @abstractmethod
    def prepare(self, images: Images, where: str = "the prompt") -> Pixels | None:
        """Return the pixels `[I, 3, H, W]` of all views of a prompt's images, or None for none."""

    @abstractmethod
    def join(self, prepared: Sequence[Pixels | None]) -> Pixels | None:
        """Return the pixels of several prompts as one."""

    @abstractmethod
    def _render(self, dialogue: Sample) -> Encoded:
        """Return a dialogue as the template writes it, open for the answer."""

    @abstractmethod
    def _read_raw(self, prompt: str) -> Encoded:
        """Return a prompt as it is, with the tokenizer's own beginning."""

    @abstractmethod
    def _write(
        self,
        prompts: Sequence[Encoded],
        pixels_IHW: Pixels | None,
        sampling: Sampling,
        *,
        remember: bool = False,
    ) -> Iterator[list[tuple[int, Token]]]:
        """Yield (answer, token) of every answer that still goes on, step by step.

        Each prompt has `sampling.n` answers, numbered one after another. With `remember`, there is
        one prompt, and `prefixes` has what was read of it before. Raises ModelError for a prompt
        that leaves no room for an answer.
        """

    def ask(
        self, prompt: Asked, images: Images, *, raw: bool = False, begun: str = ""
    ) -> tuple[Encoded, Images]:
        """Render and tokenise what is asked, or take a raw prompt as it is; return its images, too.

        `begun` is what the answer has begun with, for the model to go on from there.
        """
        if not isinstance(images, list | tuple):
            raise ModelError(f"`images` is a list of images, got {images!r:.80}; use [image]")
        if raw and isinstance(prompt, str):
            encoded = self._read_raw(prompt)
        elif raw:
            raise ModelError("messages are written by the template; leave `raw` out")
        else:
            dialogue = read_asked(prompt, images)
            encoded, images = self._render(dialogue), dialogue.images
        if begun:
            # the tokenizer's own beginning is there already
            ids, supervised = tokenise([Segment(begun)], self.tokenizer, begin=False)
            encoded = Encoded(
                np.concatenate((encoded.ids, ids)), np.concatenate((encoded.supervised, supervised))
            )
        if encoded.image_count != len(images):
            raise ModelError(
                f"the prompt has {encoded.image_count} `{IMAGE}` for {len(images)} images; "
                "each image needs exactly one"
            )
        return self.views.place(encoded, self.views.shown(images, "the prompt")), images

    def prompt(self, prompt: Asked, images: Images, **given: Any) -> Encoded:
        """Return the tokens of what is asked; `given` is what `ask` takes."""
        return self.ask(prompt, images, **given)[0]

    def generate(
        self,
        prompt: Asked,
        images: Images = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Return the answer to a prompt; see `Model.generate`."""
        chosen = _one(Sampling(**sampling))
        return self.answer([(prompt, images)], chosen, raw=raw, remember=True)[0]

    def generate_ids(
        self, prompt: Asked, images: Images = (), *, max_new_tokens: int = 64, raw: bool = False
    ) -> list[int]:
        """Return the new tokens of a greedy answer, the end token included where it came."""
        chosen = Sampling(max_new_tokens)
        return self.answer_ids([(prompt, images)], chosen, raw=raw, remember=True)[0]

    def stream(
        self,
        prompt: Asked,
        images: Images = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the answer in pieces as it comes; together they are what `generate` returns."""
        chosen = self._stopping(_one(Sampling(**sampling)), raw=raw)
        text = AnswerText(self.tokenizer, chosen.stop)
        for tokens in self._steps([(prompt, images)], chosen, raw=raw, remember=True):
            if piece := text.add(tokens[0][1].id):
                yield piece
        if piece := text.finish():
            yield piece

    def answers(
        self,
        prompt: Asked,
        images: Images = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Answer]:
        """Return the `n` answers to a prompt, with their tokens and why they ended."""
        return self.answer_all([(prompt, images)], Sampling(**sampling), raw=raw, remember=True)

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, raw: bool = False, **given: Any
    ) -> list[str]:
        """Return the answers to several prompts; `given` is what `answer_all` takes."""
        return [one.text for one in self.answer_all(prompts, sampling, raw=raw, **given)]

    def answer_ids(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, raw: bool = False, **given: Any
    ) -> list[list[int]]:
        """Return the new tokens of each answer; `given` is what `answer_all` takes."""
        found = self.answer_all(prompts, sampling, raw=raw, **given)
        return [[token.id for token in one.tokens] for one in found]

    def answer_all(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, raw: bool = False, **given: Any
    ) -> list[Answer]:
        """Return the answers to several prompts, decoded as one batch: `n` to each, in order.

        `given`: `pixels_IHW`, all their images as `join` returns them, where that is done already;
        `begun`, what each answer has begun with, where what is returned goes on from; `remember`,
        of one prompt, whether to read only what the last dialogues had not.
        """
        sampling = self._stopping(sampling, raw=raw)
        tokens: list[list[Token]] = [[] for _ in range(len(prompts) * sampling.n)]
        for step in self._steps(prompts, sampling, raw=raw, **given):
            for index, token in step:
                tokens[index].append(token)
        return [self._answer(found, sampling.stop) for found in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to what ends it."""
        return decode(self.tokenizer, ids, self.stops)

    def _answer(self, tokens: Sequence[Token], stops: Sequence[str]) -> Answer:
        ids = [token.id for token in tokens]
        text = decode(self.tokenizer, ids, stops)
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        ends = self.end_ids | special_stops(self.tokenizer, stops)
        ended = ids[-1] in ends or any(stop in whole for stop in stops)
        return Answer(text, tuple(tokens), "stop" if ended else "length")

    def _stopping(self, sampling: Sampling, *, raw: bool) -> Sampling:
        """Return `sampling` with the template's stop texts, but for a raw prompt."""
        own = () if raw else self.stops  # a raw prompt may be of another template
        return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *own))))

    def _steps(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        raw: bool,
        pixels_IHW: Pixels | None = None,
        begun: Sequence[str] = (),
        remember: bool = False,
    ) -> Iterator[list[tuple[int, Token]]]:
        asked = [
            self.ask(prompt, images, raw=raw, begun=start)
            for (prompt, images), start in zip(prompts, begun or ("",) * len(prompts), strict=True)
        ]
        if pixels_IHW is None:
            pixels_IHW = self.join([self.prepare(images) for _, images in asked])
        encoded = [one for one, _ in asked]
        return self._write(encoded, pixels_IHW, sampling, remember=remember)


def _one(sampling: Sampling) -> Sampling:
    if sampling.n > 1:
        raise ModelError(f"this gives one answer, not n={sampling.n}; `answers` gives several")
    return sampling
