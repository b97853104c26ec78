"""Runs the LLaMA family (Vicuna, LLaMA-2, SmolLM …) over the packed stream.

Weights and configuration are those of transformers' LlamaForCausalLM. The forward pass is our own,
because the last block can leave out queries, outputs and MLP of rows without a loss.

Shapes: T rows, M selected rows, E width, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llavakit import ModelError, packed_attention
from llavakit.contracts.packing import Packing, Rows
from llavakit_kernels.linear_cross_entropy import linear_cross_entropy
from llavakit_plugins.huggingface.hub import explain_config
from llavakit_plugins.language import cpu_steps, fused
from llavakit_plugins.language.options import LLAMA_TYPES, VicunaOptions as VicunaOptions
from llavakit_plugins.language.pretrained import PretrainedLanguage


class Vicuna(PretrainedLanguage):
    """A LLaMA-shaped causal language model."""

    name = "vicuna"
    Options = VicunaOptions
    default_template = "vicuna_v1"

    def __init__(self, options: VicunaOptions, model: Any = None) -> None:
        super().__init__(options, model)
        for block in self.model.model.layers:
            # in the module, and not called by us: FSDP2 gathers a block's weights in hooks that
            # only a call of the module runs. A method of no class could not be pickled.
            block.forward = partial(_block, block)

    @classmethod
    def configure(cls, table: dict[str, Any]) -> tuple[type[Any], Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        kind = table.get("model_type", "llama")
        if kind not in LLAMA_TYPES:
            raise ModelError(
                f"language model `{cls.name}` cannot run `{kind}`, only LLaMA's own architecture; "
                "use `causal-lm`"
            )
        with explain_config(LlamaConfig.__name__):
            config = LlamaConfig(**{k: v for k, v in table.items() if k != "model_type"})
        return LlamaForCausalLM, config

    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        head = self.head
        return linear_cross_entropy(
            hidden_ME, head.weight, targets_M, bias=head.bias, reduction="sum", impl=self._head_impl
        )

    def _hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        decoder = self.model.model
        blocks = cpu_steps.blocks_of(decoder, embeds_TE, packing) if rows is None else None
        if blocks is not None:
            return cpu_steps.hidden(decoder, blocks, embeds_TE, packing)
        # positions restart at 0 in each sample; the angles are the same in all layers
        cos_1TK, sin_1TK = decoder.rotary_emb(embeds_TE, packing.position_ids_T[None])
        rotary = (cos_1TK[0, :, None], sin_1TK[0, :, None])
        hidden_TE = embeds_TE
        *others, last = decoder.layers
        for block in others:
            if self.recompute and torch.is_grad_enabled():
                hidden_TE = checkpoint(block, hidden_TE, rotary, packing, None, use_reentrant=False)
            else:
                hidden_TE = block(hidden_TE, rotary, packing, None)
        hidden_ME = last(hidden_TE, rotary, packing, rows)
        return _norm(decoder.norm, hidden_ME)


def _block(
    block: Any,
    hidden_TE: Tensor,
    rotary: tuple[Tensor, Tensor],
    packing: Packing,
    rows: Rows | None,
) -> Tensor:
    """Return a decoder block's output `[T, E]`, or `[M, E]` for `rows` only if they are given.

    Keys and values are computed for all rows, since selected rows attend to them.
    """
    attention = block.self_attn
    shape = (-1, attention.head_dim)
    normed_TE = _for_products(_norm(block.input_layernorm, hidden_TE))
    k_TGK = attention.k_proj(normed_TE).unflatten(-1, shape)
    v_TGK = attention.v_proj(normed_TE).unflatten(-1, shape)
    # On CUDA one fused kernel serves all rows, so selecting queries before it gains little. With a
    # cache all new rows pass the attention, which stores their keys and values.
    few = rows is not None and not normed_TE.is_cuda and packing.cache is None
    if rows is not None and few:
        k_TGK = fused.rotate_one(k_TGK, rotary)
        normed_ME, rotary = _rows(normed_TE, rows), (_rows(rotary[0], rows), _rows(rotary[1], rows))
        q_MHK = fused.rotate_one(attention.q_proj(normed_ME).unflatten(-1, shape), rotary)
        attended = _rows_attention(q_MHK, k_TGK, v_TGK, packing, rows, attention.scaling)
    else:
        q_THK = attention.q_proj(normed_TE).unflatten(-1, shape)
        q_THK, k_TGK = fused.rotate(q_THK, k_TGK, rotary)
        # nobody asks a graph for a layer's number, and with it it would hold for that layer alone
        layer = 0 if torch.compiler.is_compiling() else attention.layer_idx
        attended = packed_attention(
            q_THK, k_TGK, v_TGK, packing, layer=layer, scale=attention.scaling
        )
        if rows is not None:
            attended = _rows(attended, rows)
    residual = hidden_TE if rows is None else _rows(hidden_TE, rows)
    hidden = residual + attention.o_proj(attended.flatten(1))
    mlp = block.mlp
    normed = _for_products(_norm(block.post_attention_layernorm, hidden))
    gated = fused.gate(mlp.act_fn, mlp.gate_proj(normed), mlp.up_proj(normed))
    output: Tensor = hidden + mlp.down_proj(gated)
    return output


def _rows(values_TX: Tensor, rows: Rows) -> Tensor:
    return values_TX.index_select(0, rows.index_M)


def _norm(norm: Any, hidden_TE: Tensor) -> Tensor:
    return F.rms_norm(hidden_TE, (hidden_TE.shape[-1],), norm.weight, norm.variance_epsilon)


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
