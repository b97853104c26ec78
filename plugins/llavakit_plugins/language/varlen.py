"""Attention over the whole packed stream by one kernel, for half precision on CUDA.

T rows, S samples, H query heads, G key-value heads, K head dimension, B = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor

from llavakit.contracts.packing import Packing, Scoring

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Packing, Scoring], Tensor]

_FLASH_WIDEST, _FLASH_MULTIPLE = 256, 8  # head dimension
_FLEX_NARROWEST = 16


def choose(
    scoring: Scoring, key_width: int, value_width: int, device: torch.device
) -> Kernel | None:
    """Return the fastest installed kernel that honours all of `scoring` on `device`, or None."""
    if key_width != value_width or not is_recent(device):
        return None
    if key_width <= _FLASH_WIDEST and scoring.sinks_H is None:
        if _has_flash_attn():  # honours a soft cap, too
            return flash_attention
        if fits_torch(scoring, key_width):
            return torch_attention
    return compiled_flex_attention if key_width >= _FLEX_NARROWEST else None


def fits_torch(scoring: Scoring, width: int) -> bool:
    """Say whether torch's own kernel honours all of `scoring`, for heads of this width."""
    plain = scoring.sinks_H is None and scoring.softcap is None
    return plain and width <= _FLASH_WIDEST and width % _FLASH_MULTIPLE == 0


@cache
def is_recent(device: torch.device) -> bool:
    """Say whether it is Ampere or later, for which these kernels are written."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


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


def torch_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """torch's own variable-length attention."""
    return attend_by_torch(q_THK, k_TGK, v_TGK, packing.bounds_S, max(packing.lengths), scoring)


def attend_by_torch(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds: Tensor, longest: int, scoring: Scoring
) -> Tensor:
    """The same, of samples within `bounds` `[S + 1]`, int32; also as a part of a graph."""
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if scoring.window is None else scoring.window - 1
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    if repeat > 1:  # it has no grouped queries
        k_TGK, v_TGK = (x.repeat_interleave(repeat, dim=1) for x in (k_TGK, v_TGK))
    attended_THK = varlen_attn(
        q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest,
        scale=scoring.scale, window_size=(reach, 0),
    )  # fmt: skip
    assert isinstance(attended_THK, Tensor)
    return attended_THK


def compiled_flex_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """FlexAttention (arXiv 2412.05496), compiled once for streams of any length."""
    return flex_attention(q_THK, k_TGK, v_TGK, packing, scoring, *_compiled())


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention import flex_attention as flex

    attend = torch.compile(flex.flex_attention, dynamic=True)
    # uncompiled, the making of a mask holds a number for each pair of rows
    return attend, torch.compile(flex.create_block_mask, dynamic=True)


def flex_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    packing: Packing,
    scoring: Scoring,
    flex: Callable[..., Any],
    create_block_mask: Callable[..., Any],
) -> Tensor:
    """FlexAttention by torch's two functions, or by what their compilation gave."""
    from torch.nn.attention.flex_attention import AuxRequest

    q_BHTK, k_BGTK, v_BGTK = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
    attended_BHTK, extra = flex(
        q_BHTK, k_BGTK, v_BGTK,
        score_mod=None if scoring.softcap is None else _capped(scoring.softcap, q_THK.device),
        block_mask=_block_mask(packing, scoring.window, create_block_mask),
        scale=scoring.scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
        return_aux=AuxRequest(lse=scoring.sinks_H is not None),
    )  # fmt: skip
    if scoring.sinks_H is not None:  # the sink takes its share of every row's weight
        share_BHT = torch.sigmoid(extra.lse - scoring.sinks_H.float()[None, :, None])
        attended_BHTK = attended_BHTK * share_BHT[..., None].to(attended_BHTK.dtype)
    attended: Tensor = attended_BHTK[0].transpose(0, 1)
    return attended


def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """Return what caps a score."""
    # a tensor: compilation for streams of any length takes no float ("unbacked_bindings")
    cap = torch.full((), softcap, device=device)

    def score(value: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.tanh(value / cap) * cap

    return score


def _block_mask(packing: Packing, window: int | None, create: Callable[..., Any]) -> Any:
    """Return the blocks of the stream in which a row sees something; made once a packing."""
    if window not in packing.masks:
        sample_T = packing.samples_T
        length = packing.starts[-1]
        reach = length if window is None else window

        def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            behind = (row >= column) & (row - column < reach)
            return behind & (sample_T[row] == sample_T[column])

        packing.masks[window] = create(sees, None, None, length, length, device=sample_T.device)
    return packing.masks[window]
