"""Decoding with a key-value cache: the prompts are read as one packed stream, then all go on
together, one row a sequence. Nothing is padded on the left, so a batch equals one by one.

    S sequences, T rows of the prompts, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llavakit.attention import KVCache
from llavakit.errors import ModelError
from llavakit.interfaces import LanguageModel
from llavakit.packing import Packing, Rows
from llavakit.sampling import Sampling as Sampling


@torch.inference_mode()
def generate_stream(
    language: LanguageModel,
    embeds_TE: Tensor,
    packing: Packing,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, (sequence, token) of every sequence that has not ended.

    A sequence ends with the tokenizer's end token, with one of `stops` in its text, at the model's
    longest length or after `max_new_tokens`.
    """
    device = embeds_TE.device
    draw = torch.Generator(device=device)
    if sampling.seed is None:
        draw.seed()
    else:
        draw.manual_seed(sampling.seed)
    room = [min(sampling.max_new_tokens, language.max_length - n) for n in packing.lengths]
    if min(room) < 1:
        raise ModelError(
            f"the prompt has {max(packing.lengths)} tokens with its images; the language model "
            f"reads at most {language.max_length}: shorten it"
        )
    layers, _, _ = language.cache_shape()
    cache = KVCache(layers, [n + m for n, m in zip(packing.lengths, room, strict=True)])
    prompt = Packing(packing.starts, packing.position_ids_T, cache)
    last = Rows(packing.last_rows_S, (1,) * len(packing.lengths))
    hidden_SE = language.hidden(embeds_TE, prompt, last)
    cache.advance(prompt)

    ends = language.end_ids
    active = list(range(len(room)))
    texts: list[list[int]] = [[] for _ in room]
    while True:
        tokens_S = _choose(language.logits(hidden_SE).float(), sampling, draw)
        chosen = tokens_S.tolist()
        yield list(zip(active, chosen, strict=True))
        going = []
        for place, (sequence, token) in enumerate(zip(active, chosen, strict=True)):
            texts[sequence].append(token)
            ended = token in ends or len(texts[sequence]) >= room[sequence]
            if not ended and stops:
                text = str(language.tokenizer.decode(texts[sequence]))
                ended = any(stop in text for stop in stops)
            if not ended:
                going.append(place)
        if not going:
            return
        if len(going) < len(active):
            cache.select(going)
            active = [active[place] for place in going]
            tokens_S = tokens_S[going]
        positions_S = torch.tensor(cache.lengths, device=device)
        step = Packing(tuple(range(len(active) + 1)), positions_S, cache)
        hidden_SE = language.hidden(language.embed(tokens_S), step)
        cache.advance(step)


def _choose(logits_SV: Tensor, sampling: Sampling, draw: torch.Generator) -> Tensor:
    """Return the next token of each sequence, `[S]`."""
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=-1)
    probabilities_SV = (logits_SV / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked_SV, order_SV = probabilities_SV.sort(dim=-1, descending=True)
        beyond_SV = ranked_SV.cumsum(dim=-1) - ranked_SV >= sampling.top_p
        ranked_SV = ranked_SV.masked_fill(beyond_SV, 0.0)
        probabilities_SV = torch.zeros_like(ranked_SV).scatter(-1, order_SV, ranked_SV)
    return torch.multinomial(probabilities_SV, 1, generator=draw)[:, 0]
