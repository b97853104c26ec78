"""Decoding with a key-value cache: the prompts are read as one packed stream, then all go on
together, one row a sequence. Nothing is padded on the left, so a batch equals one by one.

    S sequences, T rows of the prompts, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.errors import ModelError
from llavakit.contracts.model import Sampling as Sampling
from llavakit.contracts.networks import LanguageModel
from llavakit.contracts.packing import KVCache, Packing, Rows
from llavakit.model.sampling import Token, Written, choose_tokens
from llavakit.stream.detokenise import Unfinished, special_stops

Keep = Callable[[KVCache, int, Sequence[int]], None]


@torch.inference_mode()
def generate_stream(
    language: LanguageModel,
    embeds_TE: Tensor,
    packing: Packing,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]] = (),
    *,
    held: KVCache | None = None,
    known: int = 0,
    keep: Keep | None = None,
) -> Iterator[list[tuple[int, Token]]]:
    """Yield, step by step, (answer, token) of every answer that has not ended.

    Each prompt has `sampling.n` answers, numbered one after another; `prompts` are their tokens,
    for the penalties. Of one prompt, the first `known` rows may be in `held` already; `keep` is
    given the cache in the end, with its bytes and the tokens of the answer that it holds. An answer
    ends with one of the model's end tokens, where its text holds one of `sampling.stop`, at the
    model's longest length or after `max_new_tokens`. Raises ModelError for a prompt that leaves no
    room for an answer.
    """
    device = embeds_TE.device
    lengths = [known + n for n in packing.lengths]
    room = [min(sampling.max_new_tokens, language.max_length - n) for n in lengths]
    if min(room) < 1:
        raise ModelError(
            f"the prompt has {max(lengths)} tokens with its images; the language model reads at "
            f"most {language.max_length}: shorten it"
        )
    layers, _, _ = language.cache_shape()
    # as long as the answers may become: a cache that grows is copied at every step
    cache = KVCache(layers, [n + m for n, m in zip(lengths, room, strict=True)])
    if held is not None and known:  # which stays as it is, for others
        padding = (0, 0, 0, cache.capacity - known)
        for own, theirs in ((cache.keys, held.keys), (cache.values, held.values)):
            own[:] = [None if x is None else F.pad(x[:, :, :known], padding) for x in theirs]
        cache.lengths = [known]
    prompt = Packing(packing.starts, packing.position_ids_T + known, cache)
    last = Rows(packing.last_rows_S, (1,) * len(packing.lengths))  # only they choose a token
    hidden_SE = language.hidden(embeds_TE, prompt, last)
    cache.advance(prompt)

    each = [s for s in range(len(room)) for _ in range(sampling.n)]
    logits_SV = language.logits(hidden_SE).float()[each]
    if sampling.n > 1:
        cache.select(each)
    written = [
        Written(sampling, prompts[s] if prompts else (), number % sampling.n)
        for number, s in enumerate(each)
    ]
    ends = language.end_ids | special_stops(language.tokenizer, sampling.stop)  # by their ids
    unfinished = Unfinished(language.tokenizer, ends, sampling.stop, [room[s] for s in each])
    positions_S = torch.tensor(cache.lengths, device=device)
    try:
        while True:
            tokens = choose_tokens(logits_SV, [written[index] for index in unfinished.active])
            for index, token in zip(unfinished.active, tokens, strict=True):
                written[index].ids.append(token.id)
            yield list(zip(unfinished.active, tokens, strict=True))
            going = unfinished.take([token.id for token in tokens])
            if not going:
                return
            if len(going) < len(tokens):
                cache.select(going)  # what has ended costs nothing more
                positions_S = positions_S[going]
            step = Packing(tuple(range(len(going) + 1)), positions_S, cache)
            tokens_S = torch.tensor([tokens[place].id for place in going], device=device)
            logits_SV = language.logits(language.hidden(language.embed(tokens_S), step)).float()
            cache.advance(step)
            positions_S = positions_S + 1
    finally:  # also where nobody asks for the rest
        if keep is not None and len(written) == 1 and not any(cache.states):
            size = sum(x.nbytes for x in (*cache.keys, *cache.values) if x is not None)
            keep(cache, size, written[0].ids[: cache.lengths[0] - lengths[0]])
