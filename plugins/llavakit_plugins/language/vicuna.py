"""The LLaMA family (Vicuna, LLaMA-2, SmolLM …) over the packed stream.

Weights and configuration are transformers' LlamaForCausalLM; the forward pass is our own, because
the last block need not compute queries, outputs and MLP of rows that no loss looks at.

    T rows, M selected rows, E width, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llavakit import LanguageModel, ModelError
from llavakit.assembly import cast_weights
from llavakit.attention import packed_attention, rows_attention
from llavakit.packing import Packing, Rows
from llavakit_kernels.linear_cross_entropy import linear_cross_entropy
from llavakit_plugins.huggingface import (
    PretrainedOptions,
    load_tokenizer,
    missing_source,
    quietly,
    read_config,
)


class VicunaOptions(PretrainedOptions):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int | None = None
    """Longest sequence in tokens, images included; the configuration's where absent."""


class Vicuna(LanguageModel):
    """A LLaMA-shaped causal language model."""

    name = "vicuna"
    Options = VicunaOptions
    default_template = "vicuna_v1"

    def __init__(self, options: VicunaOptions, model: Any = None) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        if model is None:
            table = {k: v for k, v in read_config(options).items() if k != "model_type"}
            model = LlamaForCausalLM(LlamaConfig(**table))
            cast_weights(model, getattr(torch, options.dtype))
        self.model = model
        self.width: int = model.config.hidden_size
        self.max_length = options.max_length or model.config.max_position_embeddings

    @classmethod
    def create(cls, options: VicunaOptions, **context: Any) -> Self:
        if options.source is None:
            return cls(options, **context)
        return cls._pretrained(options.source, options)

    @classmethod
    def load(cls, options: VicunaOptions, folder: Path, **context: Any) -> Self:
        return cls._pretrained(str(folder), options)

    @classmethod
    def _pretrained(cls, source: str, options: VicunaOptions) -> Self:
        from transformers import LlamaForCausalLM

        revision = options.revision if source == options.source else None
        with quietly():
            model = LlamaForCausalLM.from_pretrained(
                source, revision=revision or "main", dtype=getattr(torch, options.dtype)
            )
        language = cls(options, model)
        language.tokenizer = load_tokenizer(source, revision)
        return language

    def save(self, folder: Path) -> None:
        with quietly():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def missing(cls, options: VicunaOptions) -> str | None:
        return missing_source("language model", options)

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self.model.lm_head
        return head

    @property
    def embedding_VE(self) -> Tensor:
        table: Tensor = self.model.model.embed_tokens.weight
        return table

    def embed(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.embedding_VE)

    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        head = self.head
        return linear_cross_entropy(
            hidden_ME, head.weight, targets_M, bias=head.bias, reduction="sum"
        )

    def cache_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        heads: int = config.num_key_value_heads
        return len(self.model.model.layers), heads, self._head_dim

    @property
    def _head_dim(self) -> int:
        dim: int = self.model.model.layers[0].self_attn.head_dim
        return dim

    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        decoder = self.model.model
        if packing.position_ids_T.shape[0] != embeds_TE.shape[0]:
            raise ModelError(
                f"the stream has {embeds_TE.shape[0]} rows, its packing "
                f"{packing.position_ids_T.shape[0]}"
            )
        cos_1TK, sin_1TK = decoder.rotary_emb(embeds_TE, packing.position_ids_T[None])
        rotary = (cos_1TK[0, :, None], sin_1TK[0, :, None])
        hidden_TE = embeds_TE
        *blocks, last = decoder.layers
        for index, block in enumerate(blocks):
            if self.recompute and torch.is_grad_enabled():
                hidden_TE = checkpoint(
                    _block, block, index, hidden_TE, rotary, packing, None, use_reentrant=False
                )
            else:
                hidden_TE = _block(block, index, hidden_TE, rotary, packing, None)
        hidden_ME = _block(last, len(blocks), hidden_TE, rotary, packing, rows)
        return _norm(decoder.norm, hidden_ME)


def _block(
    block: Any,
    index: int,
    hidden_TE: Tensor,
    rotary: tuple[Tensor, Tensor],
    packing: Packing,
    rows: Rows | None,
) -> Tensor:
    """Return what a decoder block makes of the stream; of `rows` only where they are given."""
    attention = block.self_attn
    shape = (-1, attention.head_dim)
    normed_TE = _norm(block.input_layernorm, hidden_TE)
    k_TGK = _rotate(attention.k_proj(normed_TE).unflatten(-1, shape), rotary)
    v_TGK = attention.v_proj(normed_TE).unflatten(-1, shape)
    few = rows is not None and not normed_TE.is_cuda and packing.cache is None
    if rows is not None and few:
        normed_ME, rotary = _rows(normed_TE, rows), (_rows(rotary[0], rows), _rows(rotary[1], rows))
        q_MHK = _rotate(attention.q_proj(normed_ME).unflatten(-1, shape), rotary)
        attended = rows_attention(q_MHK, k_TGK, v_TGK, packing, rows, scale=attention.scaling)
    else:
        q_THK = _rotate(attention.q_proj(normed_TE).unflatten(-1, shape), rotary)
        attended = packed_attention(
            q_THK, k_TGK, v_TGK, packing, layer=index, scale=attention.scaling
        )
        if rows is not None:
            attended = _rows(attended, rows)
    residual = hidden_TE if rows is None else _rows(hidden_TE, rows)
    hidden = residual + attention.o_proj(attended.flatten(1))
    mlp = block.mlp
    normed = _norm(block.post_attention_layernorm, hidden)
    gated = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    output: Tensor = hidden + mlp.down_proj(gated)
    return output


def _rows(values_TX: Tensor, rows: Rows) -> Tensor:
    return values_TX.index_select(0, rows.index_M)


def _norm(norm: Any, hidden_TE: Tensor) -> Tensor:
    return F.rms_norm(hidden_TE, (hidden_TE.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x_THK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions (arXiv 2104.09864), halves paired as transformers does."""
    cos_T1K, sin_T1K = rotary
    left, right = x_THK.chunk(2, dim=-1)
    return x_THK * cos_T1K + torch.cat((-right, left), dim=-1) * sin_T1K
