"""The model: vision encoder, connector and language model around one packed stream.

I images, P patches, P' visual tokens of an image, D vision width, E language width,
T rows of the stream, M supervised rows, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llavakit.answers import AnswerText, decode
from llavakit.errors import ModelError
from llavakit.generation import Sampling, generate_stream
from llavakit.images import read_pixels
from llavakit.interfaces import PromptTemplate, Segment
from llavakit.networks import Connector, LanguageModel, VisionEncoder
from llavakit.packing import PackedBatch, Stream, pack
from llavakit.prompts import Encoded, encode, tokenise
from llavakit.samples import IMAGE, ImageSource, Sample, Turn


class LlavaModel(nn.Module):
    """A LLaVA: images become embeddings in the rows of a text stream.

    Raises ModelError where the parts do not fit each other.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Connector,
        language: LanguageModel,
        template: PromptTemplate,
        *,
        choices: dict[str, dict[str, Any]],
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.language = language
        self.template = template
        self.choices = choices
        """What a recipe says of each part, enough to build the same architecture again."""

    @property
    def device(self) -> torch.device:
        return next(self.language.parameters()).device

    @property
    def visual_tokens(self) -> int:
        """How many rows of the stream one image takes (P')."""
        return self.connector.tokens(self.vision.tokens(self.vision.image_size))

    def features(self, pixels_IHW: Tensor) -> Tensor:
        """Return the patch features `[I, P, D]` of pixels `[I, 3, H, W]`, prefix stripped."""
        features_IPD: Tensor = self.vision(pixels_IHW)
        expected = self.vision.prefix_tokens + self.vision.tokens(pixels_IHW.shape[-1])
        if features_IPD.shape[1] != expected:
            raise ModelError(
                f"vision encoder `{self.vision.name}` gave {features_IPD.shape[1]} tokens, but "
                f"says {self.vision.prefix_tokens} prefix + "
                f"{expected - self.vision.prefix_tokens} patches; mend `tokens` or `prefix_tokens`"
            )
        return features_IPD[:, self.vision.prefix_tokens :]

    def embed(self, batch: PackedBatch, features_IPD: Tensor | None) -> Tensor:
        """Return the stream's embeddings `[T, E]`, text and visual rows."""
        if features_IPD is None:
            return self.language.embed(batch.token_ids_T)
        stream = Stream(
            batch.token_ids_T,
            batch.visual_rows_N,
            batch.visual_kept_N,
            self.language.embed,
            self.language.embedding_VE,
        )
        return self.connector.project_into(features_IPD, stream)

    def loss(self, batch: PackedBatch, features_IPD: Tensor | None) -> Tensor:
        """Return the summed cross-entropy of the batch's targets, float32 `[]`.

        Divide by the number of targets of the whole optimisation step: then every target weighs
        the same, however the step was cut into micro-batches.
        """
        embeds_TE = self.embed(batch, features_IPD)
        hidden_ME = self.language.hidden(embeds_TE, batch.packing, batch.target_rows)
        return self.language.loss(hidden_ME, batch.targets_M)

    def merged(self) -> LlavaModel:
        """Return the model as weights alone give it, which is what exporters write.

        See `LanguageModel.merged`; a model that has nothing but weights is returned itself.
        """
        language = self.language.merged()
        if language is self.language:
            return self
        own = {"use": language.name, **language.options.model_dump(mode="json")}
        choices = {**self.choices, "language": own}
        merged = LlavaModel(self.vision, self.connector, language, self.template, choices=choices)
        return merged.train(self.training)

    # -- trying it -----------------------------------------------------------------------------

    def prepare(self, images: Sequence[ImageSource], where: str = "the prompt") -> Tensor | None:
        """Return the pixels `[I, 3, H, W]` of images, or None for none."""
        if not images:
            return None
        dtype = next(self.vision.parameters(), torch.empty(0)).dtype
        pixels = [read_pixels(self.vision, image, where) for image in images]
        return torch.stack(pixels).to(self.device, dtype)

    def prompt(
        self, prompt: str, images: Sequence[ImageSource], *, raw: bool = False, begun: str = ""
    ) -> Encoded:
        """Render one question, or take a raw prompt as it is, and tokenise it.

        A question without placeholders gets one for each image in front. `begun` is what its
        answer has begun with, for the model to go on from there.
        """
        if raw:
            ids, learned = tokenise([Segment(prompt, markup=True)], self.language.tokenizer)
            encoded = Encoded(ids, learned)
        else:
            if IMAGE not in prompt:
                prompt = f"{IMAGE}\n" * len(images) + prompt
            sample = Sample("prompt", (Turn("human", prompt),), tuple(images))
            sample.check()
            encoded = encode(sample, self.template, self.language.tokenizer)
        if begun:
            ids, learned = tokenise([Segment(begun)], self.language.tokenizer, begin=False)
            encoded = Encoded(
                np.concatenate((encoded.ids, ids)), np.concatenate((encoded.learned, learned))
            )
        if encoded.image_count != len(images):
            raise ModelError(
                f"the prompt has {encoded.image_count} `{IMAGE}` for {len(images)} images; "
                "each image needs exactly one"
            )
        return encoded

    @torch.inference_mode()
    def logits(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False
    ) -> Tensor:
        """Return logits `[T, V]`, float32, of every row of the spliced sequence."""
        batch = pack([self.prompt(prompt, images, raw=raw)], [0], self.visual_tokens)
        hidden_TE = self.language.hidden(
            self._embed_images(batch, images), batch.packing.to(self.device)
        )
        return self.language.logits(hidden_TE).float()

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> str:
        """Return the answer to a prompt; greedy where `temperature` is 0.

        It ends before the first of the `stop` texts, besides where the model itself ends it.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop))
        return self.answer([(prompt, images)], sampling, raw=raw)[0]

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer, the end token included where it came."""
        sampling = Sampling(max_new_tokens)
        return self.answer_ids([(prompt, images)], sampling, raw=raw)[0]

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Iterator[str]:
        """Yield the answer in pieces as it comes; together they are what `generate` returns."""
        sampling = self._stopping(
            Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop)), raw=raw
        )
        text = AnswerText(self.language.tokenizer, sampling.stop)
        for tokens in self._steps([(prompt, images)], sampling, raw=raw):
            if piece := text.add(tokens[0][1]):
                yield piece
        if piece := text.finish():
            yield piece

    def answer(
        self,
        prompts: Sequence[tuple[str, Sequence[ImageSource]]],
        sampling: Sampling,
        *,
        raw: bool = False,
        pixels_IHW: Tensor | None = None,
        begun: Sequence[str] = (),
    ) -> list[str]:
        """Return the answers to several prompts with their images, decoded as one batch.

        `pixels_IHW` are all their images as `prepare` returns them, where that is done already.
        `begun` is what each answer has begun with; what is returned goes on from there.
        """
        sampling = self._stopping(sampling, raw=raw)
        found = self.answer_ids(prompts, sampling, raw=raw, pixels_IHW=pixels_IHW, begun=begun)
        return [decode(self.language.tokenizer, ids, sampling.stop) for ids in found]

    def answer_ids(
        self,
        prompts: Sequence[tuple[str, Sequence[ImageSource]]],
        sampling: Sampling,
        *,
        raw: bool = False,
        pixels_IHW: Tensor | None = None,
        begun: Sequence[str] = (),
    ) -> list[list[int]]:
        """Return the new tokens of each answer."""
        answers: list[list[int]] = [[] for _ in prompts]
        steps = self._steps(prompts, sampling, raw=raw, pixels_IHW=pixels_IHW, begun=begun)
        for tokens in steps:
            for index, token in tokens:
                answers[index].append(token)
        return answers

    def _steps(
        self,
        prompts: Sequence[tuple[str, Sequence[ImageSource]]],
        sampling: Sampling,
        *,
        raw: bool,
        pixels_IHW: Tensor | None = None,
        begun: Sequence[str] = (),
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (prompt, token) of every prompt that still goes on, step by step."""
        encoded = [
            self.prompt(prompt, images, raw=raw, begun=start)
            for (prompt, images), start in zip(prompts, begun or ("",) * len(prompts), strict=True)
        ]
        batch = pack(encoded, range(len(encoded)), self.visual_tokens)
        with torch.inference_mode():
            images = [image for _, images in prompts for image in images]
            embeds_TE = self._embed_images(batch, images, pixels_IHW)
        sampling = self._stopping(sampling, raw=raw)
        yield from generate_stream(
            self.language, embeds_TE, batch.packing.to(self.device), sampling
        )

    def _stopping(self, sampling: Sampling, *, raw: bool) -> Sampling:
        """Return `sampling` with the template's stop texts, but for a raw prompt."""
        own = () if raw else tuple(self.template.stop(self.language.tokenizer))
        return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *own))))

    def _embed_images(
        self,
        batch: PackedBatch,
        images: Sequence[ImageSource],
        pixels_IHW: Tensor | None = None,
    ) -> Tensor:
        pixels = self.prepare(images) if pixels_IHW is None else pixels_IHW
        features = None if pixels is None else self.features(pixels)
        return self.embed(batch.to(self.device), features)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to what ends it."""
        stops = tuple(self.template.stop(self.language.tokenizer))
        return decode(self.language.tokenizer, ids, stops)
