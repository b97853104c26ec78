"""Decoding with a key-value cache: the prompts are read as one packed stream, then all go on
together, one row a sequence. Nothing is padded on the left, so a batch equals one by one.

    S sequences, T rows of the prompts, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llavakit.contracts.errors import ModelError
from llavakit.contracts.model import Sampling as Sampling
from llavakit.contracts.networks import LanguageModel
from llavakit.contracts.packing import KVCache, Packing, Rows
from llavakit.model.detokenise import Unfinished, special_stops


@torch.inference_mode()
def generate_stream(
    language: LanguageModel, embeds_TE: Tensor, packing: Packing, sampling: Sampling
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, (sequence, token) of every sequence that has not ended.

    A sequence ends with one of the model's end tokens, where its text holds one of
    `sampling.stop`, at the model's longest length or after `max_new_tokens`. Raises ModelError
    for a prompt that leaves no room for an answer.
    """
    device = embeds_TE.device
    draw = torch.Generator(device=device)
    if sampling.seed is None:
        draw.seed()  # from entropy
    else:
        draw.manual_seed(sampling.seed)
    room = [min(sampling.max_new_tokens, language.max_length - n) for n in packing.lengths]
    if min(room) < 1:
        raise ModelError(
            f"the prompt has {max(packing.lengths)} tokens with its images; the language model "
            f"reads at most {language.max_length}: shorten it"
        )
    layers, _, _ = language.cache_shape()
    # as long as the answers may become: a cache that grows is copied at every step
    cache = KVCache(layers, [n + m for n, m in zip(packing.lengths, room, strict=True)])
    prompt = Packing(packing.starts, packing.position_ids_T, cache)
    last = Rows(packing.last_rows_S, (1,) * len(packing.lengths))  # only they choose a token
    hidden_SE = language.hidden(embeds_TE, prompt, last)
    cache.advance(prompt)

    ends = language.end_ids | special_stops(language.tokenizer, sampling.stop)  # by their ids
    unfinished = Unfinished(language.tokenizer, ends, sampling.stop, room)  # by id and by text
    positions_S = torch.tensor(cache.lengths, device=device)
    while True:
        tokens_S = _choose(language.logits(hidden_SE).float(), sampling, draw)
        chosen = tokens_S.tolist()
        yield list(zip(unfinished.active, chosen, strict=True))
        going = unfinished.take(chosen)
        if not going:
            return
        if len(going) < len(chosen):
            cache.select(going)  # what has ended costs nothing more
            tokens_S, positions_S = tokens_S[going], positions_S[going]
        step = Packing(tuple(range(len(going) + 1)), positions_S, cache)
        hidden_SE = language.hidden(language.embed(tokens_S), step)
        cache.advance(step)
        positions_S = positions_S + 1


def _choose(logits_SV: Tensor, sampling: Sampling, draw: torch.Generator) -> Tensor:
    """Return the next token of each sequence, `[S]`."""
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=-1)
    return torch.multinomial(distribution(logits_SV, sampling), 1, generator=draw)[:, 0]


def distribution(logits_SV: Tensor, sampling: Sampling) -> Tensor:
    """Return what the next token of each sequence is drawn with, `[S, V]`.

    Of the tokens in order of their probability, those go that come after `top_p` of it (arXiv
    1904.09751). The rest is not scaled back to 1: drawing does not ask for it.
    """
    probabilities_SV = (logits_SV / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked_SV, order_SV = probabilities_SV.sort(dim=-1, descending=True)
        beyond_SV = ranked_SV.cumsum(dim=-1) - ranked_SV >= sampling.top_p
        ranked_SV = ranked_SV.masked_fill(beyond_SV, 0.0)
        probabilities_SV = torch.zeros_like(ranked_SV).scatter(-1, order_SV, ranked_SV)
    return probabilities_SV
