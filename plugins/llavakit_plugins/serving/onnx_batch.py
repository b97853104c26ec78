"""Answers that an exported model writes together in onnxruntime.

I images, T rows of a prompt, C rows of a chunk, S answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llavakit import IMAGE_ID
from llavakit_plugins.onnx.runtime import OnnxModel
from llavakit_plugins.onnx.runtime.sessions import FloatArray
from llavakit_plugins.serving.batch import Prompt, free_memory
from llavakit_plugins.serving.onnx_cache import SharedDecoder

_SHARE = 0.3  # of the memory that is free, for the key-value cache


class OnnxBatch:
    """The answers of an exported folder; `chunk` is C. Prompts are read one at a time."""

    def __init__(self, model: OnnxModel, chunk: int, cache_rows: int | None = None) -> None:
        self._model, self._chunk = model, chunk
        self._writer = SharedDecoder.beside(model.decoder)
        shapes = model.manifest.shapes
        # keys and values, of 4 bytes each; a cache of fp16 takes half of that
        each = 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * 4
        self._rows = cache_rows or max(shapes.max_length, int(_SHARE * free_memory() / each))

    def __len__(self) -> int:
        return len(self._writer.lengths)

    def fits(self, reserved: Sequence[int]) -> bool:
        return len(reserved) <= 1 or len(reserved) * max(reserved) <= self._rows

    def read(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        first = prompts[0]
        if first.encode_next(self._model.features):
            return [first]
        if first.cache is None:
            first.embeds = self._embed(first)
            first.cache = SharedDecoder.beside(self._model.decoder)
        end = min(first.read + self._chunk, first.length)
        rows_1CE = first.embeds[None, first.read : end]
        logits_1V = first.cache.read_on(rows_1CE, first.length)
        first.read = end
        if end == first.length:
            first.logits, first.embeds = logits_1V, None
        return [first]

    def join(self, prompt: Prompt) -> None:
        self._writer.join(prompt.cache, prompt.length + prompt.room)

    def step(self, tokens: Sequence[int]) -> FloatArray:
        return self._writer.step_tokens(self._model.embed_ids(np.asarray(tokens)[:, None]))

    def leave(self, places: Sequence[int]) -> list[int]:
        return self._writer.leave(places)

    def _embed(self, prompt: Prompt) -> FloatArray:
        rows = prompt.encoded.expand(self._model.visual_tokens)
        # any id that the table has: these rows are replaced by the image's features
        ids = np.where(rows.token_ids == IMAGE_ID, 0, rows.token_ids)
        embeds_TE: FloatArray = self._model.embed_ids(ids[None])[0]
        if prompt.features:
            found_NE = np.concatenate(prompt.features).reshape(-1, embeds_TE.shape[1])
            embeds_TE[rows.visual] = self._model.arranged(found_NE, prompt.encoded)
        return embeds_TE
