"""Attention over the whole packed stream by one kernel, for half precision on CUDA.

T rows, S samples, H query heads, G key-value heads, K head dimension, B = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor

from llavakit.attention import Scoring
from llavakit.packing import Packing

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Packing, Scoring], Tensor]

_FLASH_WIDEST = 256  # head dimension
_TORCH = "torch.nn.attention.varlen"


def choose(scoring: Scoring, key_width: int, value_width: int) -> Kernel | None:
    """Return the fastest installed kernel that honours all of `scoring`, or None."""
    flash = key_width == value_width <= _FLASH_WIDEST and scoring.sinks_H is None
    if flash and find_spec("flash_attn") is not None:
        return flash_attention
    bounded = scoring.window is None or "window_size" in _known()
    if flash and scoring.softcap is None and bounded and find_spec(_TORCH) is not None:
        return torch_attention
    if key_width == value_width and find_spec("torch.nn.attention.flex_attention") is not None:
        return compiled_flex_attention
    return None


def flash_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """FlashAttention (arXiv 2307.08691), where the package `flash-attn` is installed."""
    from flash_attn import flash_attn_varlen_func

    bounds, longest = packing.bounds_S, max(packing.lengths)
    attended_THK: Tensor = flash_attn_varlen_func(
        q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest,
        softmax_scale=scoring.scale, causal=True, softcap=scoring.softcap or 0.0,
        window_size=(-1, -1) if scoring.window is None else (scoring.window - 1, 0),
    )  # fmt: skip
    return attended_THK


@cache
def _known() -> frozenset[str]:
    """Return the options of torch's varlen_attn, which grew between 2.10 and 2.14."""
    if find_spec(_TORCH) is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def torch_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """torch's own variable-length attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.bounds_S, max(packing.lengths)
    reach = -1 if scoring.window is None else scoring.window - 1
    options: dict[str, Any] = (
        {"window_size": (reach, 0)} if "window_size" in _known() else {"is_causal": True}
    )
    if scoring.scale is not None and "scale" in _known():
        options["scale"] = scoring.scale
    elif scoring.scale is not None:
        q_THK = q_THK * (scoring.scale * q_THK.shape[-1] ** 0.5)
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    if repeat > 1:
        k_TGK, v_TGK = (x.repeat_interleave(repeat, dim=1) for x in (k_TGK, v_TGK))
    attended_THK = varlen_attn(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, **options)
    assert isinstance(attended_THK, Tensor)
    return attended_THK


def compiled_flex_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """FlexAttention (arXiv 2412.05496), compiled once for streams of any length."""
    return flex_attention(q_THK, k_TGK, v_TGK, packing, scoring, _compiled())


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=True)


def flex_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    packing: Packing,
    scoring: Scoring,
    flex: Callable[..., Any],
) -> Tensor:
    """FlexAttention by `flex`, torch's function or what its compilation gave."""
    from torch.nn.attention.flex_attention import AuxRequest

    def score(value: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        cap = scoring.softcap
        return value if cap is None else torch.tanh(value / cap) * cap

    q_BHTK, k_BGTK, v_BGTK = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
    attended_BHTK, extra = flex(
        q_BHTK, k_BGTK, v_BGTK,
        score_mod=None if scoring.softcap is None else score,
        block_mask=_block_mask(packing, scoring.window),
        scale=scoring.scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
        return_aux=AuxRequest(lse=scoring.sinks_H is not None),
    )  # fmt: skip
    if scoring.sinks_H is not None:  # the sink takes its share of every row's weight
        share_BHT = torch.sigmoid(extra.lse - scoring.sinks_H.float()[None, :, None])
        attended_BHTK = attended_BHTK * share_BHT[..., None].to(attended_BHTK.dtype)
    attended: Tensor = attended_BHTK[0].transpose(0, 1)
    return attended


def _block_mask(packing: Packing, window: int | None) -> Any:
    """Return the blocks of the stream in which a row sees something; made once a packing."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in packing.block_masks:
        sample_T = packing.samples_T
        length = packing.starts[-1]
        reach = length if window is None else window

        def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            behind = (row >= column) & (row - column < reach)
            return behind & (sample_T[row] == sample_T[column])

        packing.block_masks[window] = create_block_mask(
            sees, None, None, length, length, device=sample_T.device
        )
    return packing.block_masks[window]
