"""Answers that a LlavaModel writes together over one packed stream.

I images, T rows of a prompt, C rows of a chunk, S answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llavakit import LlavaModel, pack
from llavakit.contracts.packing import KVCache, Packing, Rows
from llavakit_plugins.serving.batch import Prompt, free_memory
from llavakit_plugins.serving.cache import SharedCache

_SHARE = 0.3  # of the memory that is free, for the key-value cache


class TorchBatch:
    """The answers of a model in PyTorch; `chunk` is C."""

    def __init__(self, model: LlavaModel, chunk: int, cache_rows: int | None = None) -> None:
        self._model, self._language, self._chunk = model, model.language, chunk
        self._layers = self._language.cache_shape()[0]
        self._rows = cache_rows or _affordable(model)
        self._cache = SharedCache(self._layers)

    def __len__(self) -> int:
        return len(self._cache.lengths)

    def fits(self, reserved: Sequence[int]) -> bool:
        # the cache is a rectangle; one answer alone may always try
        return len(reserved) <= 1 or len(reserved) * max(reserved) <= self._rows

    @torch.inference_mode()
    def read(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        first = prompts[0]
        if first.encode_next(self._model.features):
            return [first]
        if first.read or first.length > self._chunk:
            self._read_chunk(first)
            return [first]
        together: list[Prompt] = []
        rows = 0
        for prompt in prompts:  # short ones side by side, as the packed stream has it
            if not prompt.unseen and not prompt.read and rows + prompt.length <= self._chunk:
                together.append(prompt)
                rows += prompt.length
        self._read_together(together)
        return together

    @torch.inference_mode()
    def join(self, prompt: Prompt) -> None:
        cache, which = prompt.cache
        self._cache.join(cache, which, prompt.length + prompt.room)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        device = self._model.device
        packing = Packing(
            tuple(range(len(tokens) + 1)),
            torch.tensor(self._cache.lengths, device=device),
            self._cache,
        )
        embeds_SE = self._language.embed(torch.tensor(tokens, device=device))
        hidden_SE = self._language.hidden(embeds_SE, packing)
        self._cache.advance(packing)
        return self._language.logits(hidden_SE).float()

    @torch.inference_mode()
    def leave(self, places: Sequence[int]) -> list[int]:
        return self._cache.leave(places)

    def _embed(self, prompt: Prompt) -> Tensor:
        batch = pack([prompt.encoded], [0], self._model.visual_tokens).to(self._model.device)
        features_IPD = torch.cat(prompt.features) if prompt.features else None
        return self._model.embed(batch, features_IPD)

    def _read_together(self, prompts: Sequence[Prompt]) -> None:
        """Read whole prompts in one stream."""
        cache = KVCache(self._layers, [prompt.length for prompt in prompts])
        packing = Packing.of([prompt.length for prompt in prompts], self._model.device)
        embeds_TE = torch.cat([self._embed(prompt) for prompt in prompts])
        logits_SV = self._read_rows(embeds_TE, packing, cache)
        for number, prompt in enumerate(prompts):
            prompt.cache, prompt.logits = (cache, number), logits_SV[number : number + 1]
            prompt.read = prompt.length

    def _read_chunk(self, prompt: Prompt) -> None:
        """Read the next rows of a long prompt."""
        if prompt.embeds is None:
            prompt.embeds = self._embed(prompt)
            prompt.cache = KVCache(self._layers, [prompt.length]), 0
            # the embedded rows hold all of it:
            # pixels and features are freed while the prompt is read
            prompt.features = []
            prompt.pixels = None
        begin, end = prompt.read, min(prompt.read + self._chunk, prompt.length)
        cache, _ = prompt.cache
        positions_C = torch.arange(begin, end, device=self._model.device)
        packing = Packing((0, end - begin), positions_C)
        logits_1V = self._read_rows(prompt.embeds[begin:end], packing, cache)
        prompt.read = end
        if end == prompt.length:
            prompt.logits, prompt.embeds = logits_1V, None

    def _read_rows(self, embeds_TE: Tensor, packing: Packing, cache: KVCache) -> Tensor:
        """Read rows into a cache; return the logits `[S, V]` behind the last of each sequence."""
        cached = Packing(packing.starts, packing.position_ids_T, cache)
        last = Rows(packing.last_rows_S, (1,) * len(packing.lengths))
        hidden_SE = self._language.hidden(embeds_TE, cached, last)
        cache.advance(cached)
        return self._language.logits(hidden_SE).float()


def _affordable(model: LlavaModel) -> int:
    """Return how many rows of the cache a share of the free memory holds."""
    layers, heads, width = model.language.cache_shape()
    each = 2 * layers * heads * width * next(model.language.parameters()).element_size()
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = free_memory()
    return max(model.language.max_length, int(_SHARE * free / each))
