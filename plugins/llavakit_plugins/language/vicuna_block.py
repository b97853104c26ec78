"""A block of the LLaMA family over the packed stream, with transformers' weights.

Shapes: T rows, M selected rows, E width, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llavakit import packed_attention
from llavakit.contracts.packing import Packing, Rows
from llavakit_plugins.language import fused


class VicunaBlock(LlamaDecoderLayer):
    """A decoder layer of LLaMA that is called with rows of a packed stream.

    A model of transformers gets it by `__class__`: the weights stay where they are, hooks such as
    those in which FSDP2 gathers a block's weights are run, and the model can be pickled.
    """

    def forward(
        self,
        hidden_TE: Tensor,
        rotary: tuple[Tensor, Tensor],
        packing: Packing,
        rows: Rows | None,
    ) -> Tensor:
        """Return the block's output `[T, E]`, or `[M, E]` for `rows` only if they are given.

        Keys and values are computed for all rows, since selected rows attend to them.
        """
        attention = self.self_attn
        shape = (-1, attention.head_dim)
        normed_TE = _for_products(fused.norm(self.input_layernorm, hidden_TE))
        k_TGK = attention.k_proj(normed_TE).unflatten(-1, shape)
        v_TGK = attention.v_proj(normed_TE).unflatten(-1, shape)
        # On CUDA one fused kernel serves all rows, so selecting queries before it gains little.
        # With a cache all new rows pass the attention, which stores their keys and values.
        few = rows is not None and not normed_TE.is_cuda and packing.cache is None
        if rows is not None and few:
            k_TGK = fused.rotate_one(k_TGK, rotary)
            normed_ME = _rows(normed_TE, rows)
            rotary = (_rows(rotary[0], rows), _rows(rotary[1], rows))
            q_MHK = fused.rotate_one(attention.q_proj(normed_ME).unflatten(-1, shape), rotary)
            attended = _rows_attention(q_MHK, k_TGK, v_TGK, packing, rows, attention.scaling)
        else:
            q_THK = attention.q_proj(normed_TE).unflatten(-1, shape)
            q_THK, k_TGK = fused.rotate(q_THK, k_TGK, rotary)
            # nobody asks a graph for a layer's number, and with it it would hold for one layer
            layer = 0 if torch.compiler.is_compiling() else attention.layer_idx
            attended = packed_attention(
                q_THK, k_TGK, v_TGK, packing, layer=layer, scale=attention.scaling
            )
            if rows is not None:
                attended = _rows(attended, rows)
        residual = hidden_TE if rows is None else _rows(hidden_TE, rows)
        hidden = residual + attention.o_proj(attended.flatten(1))
        mlp = self.mlp
        normed = _for_products(fused.norm(self.post_attention_layernorm, hidden))
        gated = fused.gate(mlp.act_fn, mlp.gate_proj(normed), mlp.up_proj(normed))
        output: Tensor = hidden + mlp.down_proj(gated)
        return output


def _rows(values_TX: Tensor, rows: Rows) -> Tensor:
    return values_TX.index_select(0, rows.index_M)


def _for_products(normed_TE: Tensor) -> Tensor:
    """Round once what autocast would round for each product that reads it."""
    if normed_TE.is_cuda and torch.is_autocast_enabled("cuda"):
        return normed_TE.to(torch.get_autocast_dtype("cuda"))
    return normed_TE


def _rows_attention(
    q_MHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing, rows: Rows, scale: float
) -> Tensor:
    """Return the attention `[M, H, K]` of selected rows only, as `packed_attention` has it.

    For the last block, where only supervised rows go on.
    """
    outputs = []
    lengths = packing.lengths
    positions = packing.position_ids_T.index_select(0, rows.index_M).split(rows.counts)
    columns = torch.arange(max(lengths), device=q_MHK.device)
    parts = zip(q_MHK.split(rows.counts), k_TGK.split(lengths), v_TGK.split(lengths), strict=True)
    for part, own in zip(parts, positions, strict=True):
        q_1HQK, k_1GCK, v_1GCK = (x.transpose(0, 1)[None] for x in part)
        if len(own):  # a sample may have no supervised row
            attended_1HQK = F.scaled_dot_product_attention(
                q_1HQK, k_1GCK, v_1GCK,
                attn_mask=own[:, None] >= columns[None, : k_1GCK.shape[2]],
                scale=scale,
                enable_gqa=q_1HQK.shape[1] != k_1GCK.shape[1],
            )  # fmt: skip
            outputs.append(attended_1HQK[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else q_MHK
