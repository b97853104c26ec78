"""An exported LLaVA with the methods of `llavakit.LlavaModel`, without torch.

I images, P' visual tokens of an image, B sequences, T rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from llavakit.answers import AnswerText, decode, special_stops
from llavakit.errors import ModelError
from llavakit.images import open_image
from llavakit.prompts import IMAGE_ID, Encoded, tokenise
from llavakit.samples import IMAGE, ImageSource, Sample, Turn
from llavakit.sampling import Sampling
from llavakit_plugins.onnx_runtime.folder import Folder, read
from llavakit_plugins.onnx_runtime.layout import DECODER, EMBEDDINGS, VISION
from llavakit_plugins.onnx_runtime.prompting import Piece
from llavakit_plugins.onnx_runtime.sessions import (
    Decoder,
    give_back_memory,
    open_session,
    pick_provider,
)
from llavakit_plugins.onnx_runtime.text import TextTokenizer

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Prompt = tuple[str, Sequence[ImageSource]]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> OnnxModel:
    """Return the model in a folder that `llava-run export --format onnx` wrote.

    `precision` is one that the folder holds (the first it lists where absent), `device` is cpu,
    cuda or auto, `threads` the number of CPU threads (onnxruntime's own choice where absent).
    Raises ModelError where a file is missing, changed, or of an operator set that the installed
    onnxruntime does not know.
    """
    folder, chosen = read(Path(path), precision)
    return OnnxModel(folder, chosen, provider=pick_provider(device), threads=threads)


class OnnxModel:
    """A LLaVA in onnxruntime."""

    def __init__(
        self,
        folder: Folder,
        precision: str,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        array: Callable[[FloatArray], Any] = lambda logits: logits,
    ) -> None:
        self.manifest, self.precision, self.provider = folder.manifest, precision, provider
        self.tokenizer = TextTokenizer.of(folder)
        self._reader = cast("Any", self.tokenizer)
        """The tokenizer for functions of the core that name transformers' class."""
        self._array = array
        """What `logits` returns the numpy array as."""
        self._vision, self._embeddings, decoder = (
            open_session(folder, graph, precision, provider, threads)
            for graph in (VISION, EMBEDDINGS, DECODER)
        )
        self.decoder = Decoder(
            decoder,
            folder.manifest.shapes,
            in_place=folder.manifest.attention == "group_query",
            provider=provider,
        )
        give_back_memory()

    @property
    def visual_tokens(self) -> int:
        """How many rows of the sequence one image takes (P')."""
        return self.manifest.shapes.visual_tokens

    def prompt(
        self, prompt: str, images: Sequence[ImageSource], *, raw: bool = False, begun: str = ""
    ) -> Encoded:
        """Render one question, or take a raw prompt as it is, and tokenise it.

        A question without placeholders gets one for each image in front. `begun` is what its
        answer has begun with, for the model to go on from there.
        """
        form = self.manifest.prompt
        if raw:
            pieces: Sequence[Piece] = [Piece(prompt, markup=True)]
        else:
            if IMAGE not in prompt:
                prompt = f"{IMAGE}\n" * len(images) + prompt
            Sample("prompt", (Turn("human", prompt),), tuple(images)).check()
            pieces = form.pieces(prompt)
        first = np.asarray(form.beginning if raw or form.adds_bos else (), np.int64)
        parts = [(first, np.zeros(len(first), np.bool_))]
        for texts in (pieces, [Piece(begun)] if begun else []):
            parts.append(tokenise(cast("Any", texts), self._reader, begin=False))
        ids, learned = zip(*parts, strict=True)
        encoded = Encoded(np.concatenate(ids), np.concatenate(learned))
        if encoded.image_count != len(images):
            raise ModelError(
                f"the prompt has {encoded.image_count} `{IMAGE}` for {len(images)} images; "
                "each image needs exactly one"
            )
        return encoded

    def prepare(
        self, images: Sequence[ImageSource], where: str = "the prompt"
    ) -> FloatArray | None:
        """Return the pixels `[I, 3, H, W]` of images, or None for none."""
        if not images:
            return None
        prepare = self.manifest.preparation.prepare
        return np.stack([prepare(open_image(image, where)) for image in images])

    def features(self, pixels_IHW: FloatArray) -> FloatArray:
        """Return the visual embeddings `[I, P', E]` of pixels `[I, 3, H, W]`."""
        (features,) = self._vision.run(["image_features"], {"pixel_values": pixels_IHW})
        return cast("FloatArray", features)

    def embed(self, encoded: Encoded, pixels_IHW: FloatArray | None) -> FloatArray:
        """Return the embeddings `[T, E]` of a prompt, text and visual rows."""
        rows = encoded.expand(self.visual_tokens)
        embeds_TE: FloatArray = self._embed(rows.token_ids[None])[0]
        if pixels_IHW is not None and len(pixels_IHW):
            embeds_TE[rows.visual] = self.features(pixels_IHW).reshape(-1, embeds_TE.shape[1])
        return embeds_TE

    def logits(self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False) -> Any:
        """Return logits `[T, V]`, float32, of every row of the spliced sequence."""
        embeds_TE = self.embed(self.prompt(prompt, images, raw=raw), self.prepare(images))
        return self._array(self.trace(embeds_TE)[0])

    def trace(self, embeds_TE: FloatArray) -> tuple[FloatArray, list[npt.NDArray[Any]]]:
        """Return logits `[T, V]` of every row, and each layer's keys and values in turn."""
        self._check_room([len(embeds_TE)], 0)
        logits = self.decoder.read(embeds_TE[None], np.ones((1, len(embeds_TE)), np.int64))
        held = self.decoder.held()
        self.decoder.release()
        return logits[0], held

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
        return self.answer_ids([(prompt, images)], Sampling(max_new_tokens), raw=raw)[0]

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
        text = AnswerText(self._reader, sampling.stop)
        for tokens in self._steps([(prompt, images)], sampling, raw=raw):
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
        pixels_IHW: FloatArray | None = None,
        begun: Sequence[str] = (),
    ) -> list[str]:
        """Return the answers to several prompts with their images, decoded as one batch.

        `pixels_IHW` are all their images as `prepare` returns them, where that is done already.
        `begun` is what each answer has begun with; what is returned goes on from there.
        """
        sampling = self._stopping(sampling, raw=raw)
        found = self.answer_ids(prompts, sampling, raw=raw, pixels_IHW=pixels_IHW, begun=begun)
        return [decode(self._reader, ids, sampling.stop) for ids in found]

    def answer_ids(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        raw: bool = False,
        pixels_IHW: FloatArray | None = None,
        begun: Sequence[str] = (),
    ) -> list[list[int]]:
        """Return the new tokens of each answer."""
        answers: list[list[int]] = [[] for _ in prompts]
        steps = self._steps(prompts, sampling, raw=raw, pixels_IHW=pixels_IHW, begun=begun)
        for tokens in steps:
            for index, token in tokens:
                answers[index].append(token)
        return answers

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to what ends it."""
        return decode(self._reader, ids, self.manifest.prompt.stops)

    def _steps(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        raw: bool,
        pixels_IHW: FloatArray | None = None,
        begun: Sequence[str] = (),
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (prompt, token) of every prompt that still goes on, step by step."""
        sampling = self._stopping(sampling, raw=raw)
        encoded = [
            self.prompt(prompt, images, raw=raw, begun=start)
            for (prompt, images), start in zip(prompts, begun or ("",) * len(prompts), strict=True)
        ]
        if pixels_IHW is None:
            pixels_IHW = self.prepare([image for _, images in prompts for image in images])
        embeds = self._embed_prompts(encoded, pixels_IHW)
        lengths = [len(rows) for rows in embeds]
        room = self._check_room(lengths, sampling.max_new_tokens)
        ends = special_stops(self._reader, sampling.stop).union(self.manifest.end_tokens)
        texts = [AnswerText(self._reader, sampling.stop) for _ in room] if sampling.stop else None
        draw = np.random.default_rng(sampling.seed)
        capacity = max(n + m for n, m in zip(lengths, room, strict=True))
        active = list(range(len(prompts)))
        try:
            logits_BV = self._read(embeds, capacity)
            while True:
                chosen = choose(logits_BV, sampling, draw)
                yield list(zip(active, chosen, strict=True))
                going = []
                for place, (index, token) in enumerate(zip(active, chosen, strict=True)):
                    room[index] -= 1
                    lengths[index] += 1
                    ended = token in ends or not room[index]
                    if texts is not None and not ended:
                        texts[index].add(token)
                        ended = texts[index].stopped
                    if not ended:
                        going.append(place)
                if not going:
                    return
                if len(going) < len(active):
                    self.decoder.select(going)
                    active = [active[place] for place in going]
                    chosen = [chosen[place] for place in going]
                places = np.asarray([[lengths[index] - 1] for index in active], np.int64)
                embeds_B1E = self._embed(np.asarray(chosen, np.int64)[:, None])
                logits_BV = self.decoder.step(embeds_B1E, places)
        finally:
            self.decoder.release()

    def _stopping(self, sampling: Sampling, *, raw: bool) -> Sampling:
        """Return `sampling` with the template's stop texts, but for a raw prompt."""
        own = () if raw else self.manifest.prompt.stops
        return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *own))))

    def _embed_prompts(
        self, encoded: Sequence[Encoded], pixels_IHW: FloatArray | None
    ) -> list[FloatArray]:
        """Return the embeddings `[T, E]` of each prompt."""
        found, begin = [], 0
        for one in encoded:
            end = begin + one.image_count
            found.append(self.embed(one, None if pixels_IHW is None else pixels_IHW[begin:end]))
            begin = end
        return found

    def _read(self, embeds: Sequence[FloatArray], capacity: int) -> FloatArray:
        """Read the prompts as one batch, padded on the right; return each one's next logits."""
        lengths = [len(rows) for rows in embeds]
        longest = max(lengths)
        batch_BTE = np.zeros((len(embeds), longest, embeds[0].shape[1]), np.float32)
        real_BT = np.zeros((len(embeds), longest), np.int64)
        for index, rows in enumerate(embeds):
            batch_BTE[index, : len(rows)] = rows
            real_BT[index, : len(rows)] = 1
        keep = longest - min(lengths) + 1
        room = capacity + longest - min(lengths)
        logits_BKV = self.decoder.read(batch_BTE, real_BT, keep=keep, capacity=room)
        last = [length - 1 - (longest - keep) for length in lengths]
        return logits_BKV[np.arange(len(lengths)), last]

    def _check_room(self, lengths: Sequence[int], new: int) -> list[int]:
        """Return how many tokens each sequence may still get."""
        longest = self.manifest.shapes.max_length
        room = [min(new, longest - length) for length in lengths]
        if min(room) < min(new, 1):
            raise ModelError(
                f"the prompt has {max(lengths)} tokens with its images; the language model reads "
                f"at most {longest}: shorten it"
            )
        return room

    def _embed(self, ids_BT: IntArray) -> FloatArray:
        ids = np.where(ids_BT == IMAGE_ID, 0, ids_BT)
        (embeds,) = self._embeddings.run(["inputs_embeds"], {"input_ids": ids})
        return cast("FloatArray", embeds)


def choose(logits_BV: FloatArray, sampling: Sampling, draw: np.random.Generator) -> list[int]:
    """Return the next token of each sequence."""
    if sampling.temperature == 0:
        return [int(token) for token in logits_BV.argmax(axis=-1)]
    scaled_BV = logits_BV.astype(np.float64) / sampling.temperature
    weights_BV = np.exp(scaled_BV - scaled_BV.max(axis=-1, keepdims=True))
    chosen = []
    for weights_V in weights_BV:
        shares_V = weights_V / weights_V.sum()
        order = np.argsort(-shares_V, kind="stable")
        before = np.cumsum(shares_V[order]) - shares_V[order]
        kept = order[before < sampling.top_p]
        chosen.append(int(draw.choice(kept, p=shares_V[kept] / shares_V[kept].sum())))
    return chosen
