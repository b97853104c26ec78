"""Asking a model: what is the same whatever runs it, PyTorch or an exported graph. Without torch.

I images, T rows of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, Unpack

import numpy as np

from llavakit.contracts.data import IMAGE, ImageSource, Sample, Turn
from llavakit.contracts.errors import ModelError
from llavakit.contracts.interfaces import Segment
from llavakit.contracts.model import Sampling, SamplingOptions
from llavakit.model.detokenise import AnswerText, decode
from llavakit.stream.encode import Encoded, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = tuple[str, Sequence[ImageSource]]  #: A prompt and its images.
Pixels = TypeVar("Pixels")  #: Prepared images `[I, 3, H, W]`: a tensor, or an array of numpy.


class Answering(ABC, Generic[Pixels]):
    """Answers prompts with images. A runtime says how they are read and how tokens are written."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or what stands for it."""

    @property
    @abstractmethod
    def stops(self) -> Sequence[str]:
        """The template's texts that end an answer, besides the end tokens."""

    @abstractmethod
    def prepare(self, images: Sequence[ImageSource], where: str = "the prompt") -> Pixels | None:
        """Return the pixels `[I, 3, H, W]` of images, or None for none."""

    @abstractmethod
    def _render(self, question: Sample) -> Encoded:
        """Return a question as the template writes it, open for the answer."""

    @abstractmethod
    def _read_raw(self, prompt: str) -> Encoded:
        """Return a prompt as it is, with the tokenizer's own beginning."""

    @abstractmethod
    def _write(
        self, prompts: Sequence[Encoded], pixels_IHW: Pixels | None, sampling: Sampling
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (prompt, token) of every prompt that still goes on, step by step.

        Raises ModelError for a prompt that leaves no room for an answer.
        """

    def prompt(
        self, prompt: str, images: Sequence[ImageSource], *, raw: bool = False, begun: str = ""
    ) -> Encoded:
        """Render one question, or take a raw prompt as it is, and tokenise it.

        A question without placeholders gets one for each image in front. `begun` is what its
        answer has begun with, for the model to go on from there.
        """
        if raw:
            encoded = self._read_raw(prompt)
        else:
            if IMAGE not in prompt:
                prompt = f"{IMAGE}\n" * len(images) + prompt  # where the original puts them
            question = Sample("prompt", (Turn("human", prompt),), tuple(images))
            question.check()
            encoded = self._render(question)
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
        return encoded

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Return the answer to a prompt; see `Model.generate`."""
        return self.answer([(prompt, images)], Sampling(**sampling), raw=raw)[0]

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer, the end token included where it came."""
        return self.answer_ids([(prompt, images)], Sampling(max_new_tokens), raw=raw)[0]

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        raw: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the answer in pieces as it comes; together they are what `generate` returns."""
        chosen = self._stopping(Sampling(**sampling), raw=raw)
        text = AnswerText(self.tokenizer, chosen.stop)
        for tokens in self._steps([(prompt, images)], chosen, raw=raw):
            if piece := text.add(tokens[0][1]):
                yield piece
        if piece := text.finish():
            yield piece

    def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        raw: bool = False,
        pixels_IHW: Pixels | None = None,
        begun: Sequence[str] = (),
    ) -> list[str]:
        """Return the answers to several prompts with their images, decoded as one batch.

        `pixels_IHW` are all their images as `prepare` returns them, where that is done already.
        `begun` is what each answer has begun with; what is returned goes on from there.
        """
        found = self.answer_ids(prompts, sampling, raw=raw, pixels_IHW=pixels_IHW, begun=begun)
        stops = self._stopping(sampling, raw=raw).stop
        return [decode(self.tokenizer, ids, stops) for ids in found]

    def answer_ids(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, raw: bool = False, **given: Any
    ) -> list[list[int]]:
        """Return the new tokens of each answer; `given` is what `answer` takes."""
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, self._stopping(sampling, raw=raw), raw=raw, **given):
            for index, token in tokens:
                answers[index].append(token)
        return answers

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to what ends it."""
        return decode(self.tokenizer, ids, self.stops)

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
    ) -> Iterator[list[tuple[int, int]]]:
        encoded = [
            self.prompt(prompt, images, raw=raw, begun=start)
            for (prompt, images), start in zip(prompts, begun or ("",) * len(prompts), strict=True)
        ]
        if pixels_IHW is None:
            pixels_IHW = self.prepare([image for _, images in prompts for image in images])
        return self._write(encoded, pixels_IHW, sampling)
