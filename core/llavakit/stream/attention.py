"""Causal attention within each sample of a packed stream, in training and in decoding.

T rows, S samples, H query heads, G key-value heads, K head dimension, L longest cache; within one
sample Q rows that look and C columns that are looked at.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.packing import KVCache, Packing, Scoring
from llavakit.registry.entry_points import entry_points, imported

# found once, at import: torch.compile cannot trace a look-up of entry points
_CHOOSERS = tuple(map(imported, entry_points(group="llavakit.attention")))
"""What entry points of the group `llavakit.attention` name: called with the scoring, the widths of
keys and values and the device, each returns a kernel `(q, k, v, packing, scoring)`, or None."""


def packed_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    packing: Packing,
    *,
    layer: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return causal attention `[T, H, K]`; no row sees another sample's.

    The options are those of `Scoring`. In half precision on CUDA, which autocast counts as, the
    first kernel of a plugin that honours them reads the whole stream; else each sample is read by
    itself.
    """
    scoring = Scoring(scale, window, softcap, sinks_H)
    kind = q_THK.device.type
    if torch.is_autocast_enabled(kind):
        # beside float32 weights, rotary angles make queries and keys float32, and values stay half
        half = torch.get_autocast_dtype(kind)
        q_THK, k_TGK, v_TGK = q_THK.to(half), k_TGK.to(half), v_TGK.to(half)
    if (attend := getattr(packing, "attend", None)) is not None:  # a graph's stream, not ours
        return cast("Tensor", attend(q_THK, k_TGK, v_TGK, scoring))
    if packing.watch is not None:
        packing.watch.see(layer, q_THK, k_TGK, packing, scoring)
    if packing.cache is not None:
        _store(packing.cache, layer, k_TGK, v_TGK, packing)
        if any(packing.cache.lengths):  # else it is a prompt, read as in training
            return _decode(q_THK, packing, packing.cache, layer, scoring)
    if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16):
        for choose in _CHOOSERS:
            kernel = choose(scoring, q_THK.shape[-1], v_TGK.shape[-1], q_THK.device)
            if kernel is not None:
                return cast("Tensor", kernel(q_THK, k_TGK, v_TGK, packing, scoring))
    outputs = []
    # split, not slices: the gradient of each slice would be as long as the whole stream
    parts = (x_TXK.split(packing.lengths) for x_TXK in (q_THK, k_TGK, v_TGK))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if not scoring.plain or (window is not None and len(q) > window):
            index = torch.arange(len(q), device=q.device)
            mask = _band(index, index, window)
        outputs.append(_attend(q, k, v, mask, scoring))
    return torch.cat(outputs)


def _band(rows_Q: Tensor, columns_C: Tensor, window: int | None) -> Tensor:
    """Return which columns each row may see, `[Q, C]` bool."""
    distance_QC = rows_Q[:, None] - columns_C[None, :]
    visible_QC = distance_QC >= 0
    return visible_QC if window is None else visible_QC & (distance_QC < window)


def _attend(
    q_QHK: Tensor, k_CGK: Tensor, v_CGK: Tensor, mask_QC: Tensor | None, scoring: Scoring
) -> Tensor:
    """Return one sample's attention `[Q, H, K]`; causal where there is no mask."""
    q_1HQK, k_1GCK, v_1GCK = (x.transpose(0, 1)[None] for x in (q_QHK, k_CGK, v_CGK))
    return _weigh(q_1HQK, k_1GCK, v_1GCK, mask_QC, scoring)[0].transpose(0, 1)


def _weigh(
    q_SHQK: Tensor, k_SGCK: Tensor, v_SGCK: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Return attention `[S, H, Q, K]`; `mask` is `[Q, C]` or `[S, 1, Q, C]`, None for causal."""
    if scoring.plain:
        return F.scaled_dot_product_attention(
            q_SHQK, k_SGCK, v_SGCK,
            attn_mask=mask, is_causal=mask is None, scale=scoring.scale,
            enable_gqa=q_SHQK.shape[1] != k_SGCK.shape[1],
        )  # fmt: skip
    assert mask is not None
    repeat = q_SHQK.shape[1] // k_SGCK.shape[1]
    k_SHCK, v_SHCK = (x.repeat_interleave(repeat, dim=1) for x in (k_SGCK, v_SGCK))
    scale = q_SHQK.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores_SHQC = q_SHQK @ k_SHCK.transpose(2, 3) * scale
    if scoring.softcap is not None:
        scores_SHQC = torch.tanh(scores_SHQC / scoring.softcap) * scoring.softcap
    scores_SHQC = scores_SHQC.float().masked_fill(~mask, float("-inf"))
    if scoring.sinks_H is not None:
        sinks = scoring.sinks_H.float().view(1, -1, 1, 1).expand(*scores_SHQC.shape[:3], 1)
        scores_SHQC = torch.cat((scores_SHQC, sinks), dim=-1)
    return scores_SHQC.softmax(dim=-1)[..., : k_SHCK.shape[2]].to(v_SHCK.dtype) @ v_SHCK


def _store(cache: KVCache, layer: int, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> None:
    """Store the rows of a packed stream behind what each sequence already holds."""
    count = len(cache.lengths)
    sequences = torch.arange(count, device=k_TGK.device)
    for store, new_TGK in ((cache.keys, k_TGK), (cache.values, v_TGK)):
        held = store[layer]
        if held is None:
            shape = (count, new_TGK.shape[1], cache.capacity, new_TGK.shape[2])
            held = store[layer] = new_TGK.new_zeros(shape)
        if packing.starts[-1] == count:  # decoding: one row a sequence, written at once
            held[sequences, :, packing.position_ids_T] = new_TGK
            continue
        news = new_TGK.split(packing.lengths)
        for held_GLK, begin, new in zip(held, cache.lengths, news, strict=True):
            held_GLK[:, begin : begin + len(new)] = new.transpose(0, 1)


def _decode(q_THK: Tensor, packing: Packing, kv: KVCache, layer: int, scoring: Scoring) -> Tensor:
    """Attend from new rows to everything the cache holds, the new rows included."""
    keys, values = (cast("Tensor", held[layer]) for held in (kv.keys, kv.values))
    totals = [held + new for held, new in zip(kv.lengths, packing.lengths, strict=True)]
    if packing.starts[-1] == len(kv.lengths):  # one row a sequence: all at once
        longest = kv.columns_on_cuda(max(totals)) if q_THK.is_cuda else max(totals)
        keys, values = (x[:, :, :longest] for x in (keys, values))  # behind it they are empty
        kind = (scoring.window, scoring.plain)
        mask_S11L = packing.masks.get(kind)
        if mask_S11L is None:
            columns = torch.arange(longest, device=q_THK.device)
            mask_S11L = _band(packing.position_ids_T, columns, scoring.window)[:, None, None]
            if scoring.plain:  # what is added to scores, which each layer would make of it
                mask_S11L = q_THK.new_zeros(()).masked_fill(~mask_S11L, float("-inf"))
            packing.masks[kind] = mask_S11L
        rows = (keys.shape[1], -1) if scoring.plain else (-1, 1)  # CUDA masks no groups, but rows
        return _weigh(q_THK.unflatten(1, rows), keys, values, mask_S11L, scoring).flatten(1, 2)
    outputs = []
    for s, total in enumerate(totals):
        own = slice(packing.starts[s], packing.starts[s + 1])
        columns = torch.arange(total, device=q_THK.device)
        mask = _band(packing.position_ids_T[own], columns, scoring.window)
        k_CGK, v_CGK = keys[s, :, :total].transpose(0, 1), values[s, :, :total].transpose(0, 1)
        outputs.append(_attend(q_THK[own], k_CGK, v_CGK, mask, scoring))
    return torch.cat(outputs)
