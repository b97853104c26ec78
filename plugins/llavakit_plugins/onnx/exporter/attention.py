"""Writes the attention of transformers' language models as ONNX operators while a graph is traced.

Shapes: B sequences, T rows, H query heads, G key-value heads, K head dimension, P past rows,
L = P + T.

transformers calls its attention function by name, so one function here serves every model. The code
around it (projections, biases, norms of queries and keys, rotary positions) is traced unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit import ModelError

Attention = Literal["group_query", "plain"]
Pair = tuple[Tensor, Tensor]
_NAME = "llavakit_onnx"


@dataclass
class Trace:
    """Inputs and outputs of the attention of all layers during one trace."""

    attention: Attention
    """`group_query` is onnxruntime's own operator; `plain` is matrix products and a softmax."""
    mask_BL: Tensor
    """int64: 1 for a token, 0 for padding; past columns first."""
    past: Sequence[Pair]
    """Keys and values `[B, G, P, K]` of each layer."""
    present: dict[int, Pair] = field(default_factory=dict)
    """Keys and values `[B, G, L, K]` of each layer, filled by `attend`."""

    def attend(
        self,
        module: Any,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return the attention `[B, T, H, K]`; transformers calls this for each layer.

        Raises ModelError for attention that has no ONNX form here: sinks, values of another size
        than keys, and layers that share a cache.
        """
        if s_aux is not None or k_BGTK.shape[-1] != v_BGTK.shape[-1]:
            raise ModelError(
                f"the attention of {type(module).__name__} has no ONNX form here (attention sinks, "
                "or keys and values of different size); export a model without them"
            )
        layer: int = module.layer_idx
        if layer in self.present:
            raise ModelError(
                f"{type(module).__name__} shares layer {layer}'s key-value cache between layers, "
                "which has no ONNX form here"
            )
        scale = q_BHTK.shape[-1] ** -0.5 if scaling is None else float(scaling)
        attend = self._group_query if self.attention == "group_query" else self._plain
        return attend(layer, q_BHTK, k_BGTK, v_BGTK, scale, sliding_window, softcap or 0.0), None

    def _group_query(
        self,
        layer: int,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        scale: float,
        window: int | None,
        softcap: float,
    ) -> Tensor:
        batch, heads, rows, width = q_BHTK.shape
        groups = k_BGTK.shape[1]
        past_key, past_value = self.past[layer]
        held = (batch, groups, past_key.shape[2] + rows, width)
        # the operator's `seqlens_k` is the number of tokens minus 1, `total` the longest length
        lengths_B = (self.mask_BL.sum(1) - 1).to(torch.int32)
        total = torch.full((), self.mask_BL.shape[1], dtype=torch.int32)
        attrs: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups, "scale": scale}
        if window is not None:
            attrs["local_window_size"] = window
        if softcap:
            attrs["softcap"] = softcap
        flat = [x.transpose(1, 2).flatten(2) for x in (q_BHTK, k_BGTK, v_BGTK)]
        attended, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*flat, past_key, past_value, lengths_B, total),
            attrs=attrs,
            dtypes=(q_BHTK.dtype,) * 3,
            shapes=((batch, rows, heads * width), held, held),
            version=1,
        )
        self.present[layer] = (key, value)
        by_head: Tensor = attended.unflatten(-1, (heads, width))
        return by_head

    def _plain(
        self,
        layer: int,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        scale: float,
        window: int | None,
        softcap: float,
    ) -> Tensor:
        key = torch.cat((self.past[layer][0], k_BGTK), dim=2)
        value = torch.cat((self.past[layer][1], v_BGTK), dim=2)
        self.present[layer] = (key, value)
        bias_B1TL = self._bias(q_BHTK.shape[2], window, q_BHTK.dtype)
        # plain ONNX has no grouped heads: each key-value head is repeated for its queries
        repeat = q_BHTK.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        if softcap:
            scores = torch.tanh(q_BHTK @ key.transpose(2, 3) * (scale / softcap)) * softcap
            return ((scores + bias_B1TL).softmax(-1) @ value).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q_BHTK, key, value, bias_B1TL, scale=scale)
        return attended.transpose(1, 2)

    def _bias(self, rows: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the bias `[B, 1, T, L]`: 0 for visible columns, a large negative number elsewhere.

        A window counts tokens and not columns: in a batch, a shorter prompt has padding between its
        own rows and the rows of its answer.
        """
        past = self.past[0][0].shape[2]
        columns_L = torch.arange(self.mask_BL.shape[1])
        rows_T1 = (torch.arange(rows) + past)[:, None]
        visible_B1TL = (columns_L <= rows_T1) & self.mask_BL.bool()[:, None, None, :]
        if window is not None:
            positions_BL = self.mask_BL.cumsum(1)
            first_BT = positions_BL[:, past:] - window
            visible_B1TL = visible_B1TL & (positions_BL[:, None] > first_BT[:, :, None])[:, None]
        # not -inf: -1e4 fits into float16, and a row of padding alone must not become NaN
        hidden = torch.full((), -1e4, dtype=dtype)
        return torch.where(visible_B1TL, torch.zeros((), dtype=dtype), hidden)


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Remove `forward` methods that were set on single modules, such as those of the packed stream.

    So transformers' own code is traced. The export's proof checks that it computes the same.
    """
    changed = [(module, vars(module)["forward"]) for module in model.modules()
               if "forward" in vars(module)]  # fmt: skip
    for module, _ in changed:
        del module.forward
    try:
        yield
    finally:
        for module, forward in changed:
            module.forward = forward


@contextmanager
def attention_of(model: Any, trace: Trace) -> Iterator[Any]:
    """Let a transformers model use `trace` as its attention; yield the cache to call it with."""
    from transformers import DynamicCache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class NewRows(DynamicCache):
        """Gives a layer the keys and values of the new rows only; `trace` adds the past."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> Pair:
            return key_states, value_states

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(_NAME, trace.attend)
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield NewRows()
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
