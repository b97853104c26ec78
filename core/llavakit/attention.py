"""Causal attention within each sample of a packed stream, and the key-value cache for decoding.

T rows, S samples, H query heads, G key-value heads, K head dimension, L longest cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.packing import Packing, Rows


class KVCache:
    """Keys and values of S sequences, right-padded to the longest, one pair for each layer."""

    def __init__(self, layers: int, capacities: Sequence[int]) -> None:
        self.lengths = [0] * len(capacities)
        """Tokens held for each sequence, the same in every layer."""
        self.capacity = max(capacities)
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> None:
        """Store the rows of a packed stream behind what each sequence already holds."""
        if self.keys[layer] is None:
            shape = (len(self.lengths), k_TGK.shape[1], self.capacity, k_TGK.shape[2])
            self.keys[layer], self.values[layer] = k_TGK.new_zeros(shape), v_TGK.new_zeros(shape)
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        if packing.starts[-1] == len(self.lengths):  # decoding: one row a sequence
            rows = torch.arange(len(self.lengths), device=k_TGK.device)
            places = packing.position_ids_T
            keys[rows, :, places] = k_TGK
            values[rows, :, places] = v_TGK
            return
        for s, (start, end) in enumerate(pairwise(packing.starts)):
            begin = self.lengths[s]
            held = slice(begin, begin + end - start)
            keys[s, :, held] = k_TGK[start:end].transpose(0, 1)
            values[s, :, held] = v_TGK[start:end].transpose(0, 1)

    def advance(self, packing: Packing) -> None:
        """Count the rows of a stream as held, once every layer has stored them."""
        self.lengths = [n + m for n, m in zip(self.lengths, packing.lengths, strict=True)]

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    rows = torch.tensor(list(sequences), device=tensor.device)
                    store[layer] = tensor.index_select(0, rows)
        self.lengths = [self.lengths[s] for s in sequences]


def packed_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    packing: Packing,
    *,
    layer: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return causal attention `[T, H, K]`; no row sees another sample's.

    `scale` defaults to 1/sqrt(K); `window` limits how far back a row sees, itself included.
    """
    if packing.cache is not None:
        packing.cache.append(layer, k_TGK, v_TGK, packing)
        if any(packing.cache.lengths):
            return _decode(q_THK, packing, layer, scale, window)
    half = q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16)
    if half and window is None and (varlen := _varlen()) is not None:
        return varlen(q_THK, k_TGK, v_TGK, packing, scale)
    outputs = []
    lengths = packing.lengths
    # split, not slices: the gradient of each slice would be as long as the whole stream
    parts = zip(q_THK.split(lengths), k_TGK.split(lengths), v_TGK.split(lengths), strict=True)
    for q, k, v in parts:
        mask = None
        if window is not None and len(q) > window:
            places = torch.arange(len(q), device=q.device)
            mask = _band(places, places, window)
        outputs.append(_sdpa(q, k, v, mask, causal=mask is None, scale=scale))
    return torch.cat(outputs)


def rows_attention(
    q_MHK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    packing: Packing,
    rows: Rows,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return the attention `[M, H, K]` of selected rows only, as `packed_attention` has it.

    For the last block, where only supervised rows go on.
    """
    outputs = []
    lengths = packing.lengths
    places = packing.position_ids_T.index_select(0, rows.index_M).split(rows.counts)
    columns = torch.arange(max(lengths), device=q_MHK.device)
    parts = zip(q_MHK.split(rows.counts), k_TGK.split(lengths), v_TGK.split(lengths), strict=True)
    for (q, k, v), place in zip(parts, places, strict=True):
        if len(q):
            mask = _band(place, columns[: len(k)], None)
            outputs.append(_sdpa(q, k, v, mask, causal=False, scale=scale))
    return torch.cat(outputs) if outputs else q_MHK


def _band(rows_Q: Tensor, columns_C: Tensor, window: int | None) -> Tensor:
    """Return which columns each row may see, `[Q, C]` bool."""
    distance_QC = rows_Q[:, None] - columns_C[None, :]
    visible_QC = distance_QC >= 0
    return visible_QC if window is None else visible_QC & (distance_QC < window)


def _sdpa(
    q_QHK: Tensor,
    k_CGK: Tensor,
    v_CGK: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    attended_1HQK = F.scaled_dot_product_attention(
        q_QHK.transpose(0, 1)[None],
        k_CGK.transpose(0, 1)[None],
        v_CGK.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_QHK.shape[1] != k_CGK.shape[1],
    )
    return attended_1HQK[0].transpose(0, 1)


def _decode(
    q_THK: Tensor, packing: Packing, layer: int, scale: float | None, window: int | None
) -> Tensor:
    """Attend from new rows to everything the cache holds, the new rows included."""
    store = packing.cache
    assert store is not None
    keys, values = store.keys[layer], store.values[layer]
    assert keys is not None
    assert values is not None
    longest = max(held + new for held, new in zip(store.lengths, packing.lengths, strict=True))
    columns = torch.arange(longest, device=q_THK.device)
    gqa = q_THK.shape[1] != keys.shape[1]
    if packing.starts[-1] == len(store.lengths):  # one row a sequence: all at once
        mask_S11L = _band(packing.position_ids_T, columns, window)[:, None, None]
        attended_SH1K = F.scaled_dot_product_attention(
            q_THK[:, :, None], keys[:, :, :longest], values[:, :, :longest],
            attn_mask=mask_S11L, scale=scale, enable_gqa=gqa,
        )  # fmt: skip
        return attended_SH1K[:, :, 0]
    outputs = []
    for s, (start, end) in enumerate(pairwise(packing.starts)):
        total = store.lengths[s] + end - start
        mask = _band(packing.position_ids_T[start:end], columns[:total], window)
        k_CGK, v_CGK = keys[s, :, :total].transpose(0, 1), values[s, :, :total].transpose(0, 1)
        outputs.append(_sdpa(q_THK[start:end], k_CGK, v_CGK, mask, causal=False, scale=scale))
    return torch.cat(outputs)


Varlen = Callable[[Tensor, Tensor, Tensor, Packing, float | None], Tensor]


@cache
def _varlen() -> Varlen | None:
    """Return a variable-length attention for CUDA in half precision, or None."""
    if find_spec("flash_attn") is not None:
        return _flash_attn
    if find_spec("torch.nn.attention.varlen") is not None:
        return _torch_varlen
    return None


def _bounds(packing: Packing, like: Tensor) -> tuple[Tensor, int]:
    return torch.tensor(packing.starts, dtype=torch.int32, device=like.device), max(packing.lengths)


def _flash_attn(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scale: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = _bounds(packing, q_THK)
    attended_THK: Tensor = flash_attn_varlen_func(
        q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )
    return attended_THK


def _torch_varlen(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = _bounds(packing, q_THK)
    known = signature(varlen_attn).parameters  # it gained these between 2.10 and 2.14
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if scale is not None and "scale" in known:
        causal["scale"] = scale
    elif scale is not None:
        q_THK = q_THK * (scale * q_THK.shape[-1] ** 0.5)
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    if repeat > 1:
        k_TGK, v_TGK = (x.repeat_interleave(repeat, dim=1) for x in (k_TGK, v_TGK))
    attended_THK = varlen_attn(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, **causal)
    assert isinstance(attended_THK, Tensor)
    return attended_THK
