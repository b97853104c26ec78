"""Runs the LLaMA family (Vicuna, LLaMA-2, SmolLM …) over the packed stream.

Weights and configuration are those of transformers' LlamaForCausalLM. The forward pass is our own,
because the last block can leave out queries, outputs and MLP of rows without a loss.

Shapes: T rows, M selected rows, E width, K head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llavakit import ModelError
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
        # transformers is imported where a model is made, not where options are read
        from llavakit_plugins.language.vicuna_block import VicunaBlock

        super().__init__(options, model)
        for block in self.model.model.layers:
            block.__class__ = VicunaBlock

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
        return fused.norm(decoder.norm, hidden_ME)
