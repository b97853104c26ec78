"""A step of decoding through LLaMA's blocks on a CPU, where each product reads its matrix once.

Between its products a block does some forty small operations. Through PyTorch each of them costs
more than it computes, on a core whose caches the matrices have swept; numpy's ways are shorter.

Shapes: S sequences with a row each, E width, H query heads, G key-value heads, K head dimension,
R queries of a head's group, I inputs and O outputs of a product, F width of the hidden layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.packing import KVCache, Packing
from llavakit_kernels import few_rows, onednn
from llavakit_plugins.language.fused import SILU

_PRODUCTS = (few_rows.Linear, few_rows.OnednnLinear)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENDING = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """What a step needs of a decoder block."""

    attention: Any
    norms: tuple[Any, ...]
    attending: tuple[Any, ...]
    gated: tuple[Any, ...]

    @classmethod
    def of(cls, block: Any) -> Self | None:
        """Return it, or None where modules are of other types, have hooks or other weights."""
        # a module's own tables: what looks for attributes takes longer than all that is asked here
        attention, mlp = block._modules["self_attn"], block._modules["mlp"]
        norms = tuple(map(block._modules.get, _NORMS))
        attending = tuple(map(attention._modules.get, _ATTENDING))
        gated = tuple(map(mlp._modules.get, _GATED))
        modules = (*attending, *gated, *norms, block, attention, mlp)
        if (
            any(module._forward_hooks or module._forward_pre_hooks for module in modules)
            or any(type(product) not in _PRODUCTS for product in modules[:7])
            or type(mlp.act_fn).__name__ not in SILU
        ):
            return None
        held = (value for module in modules[:9] for value in module._parameters.values())
        return cls(attention, norms, attending, gated) if onednn.plain(*held) else None


def blocks_of(decoder: Any, embeds_SE: Tensor, packing: Packing) -> list[Block] | None:
    """Return the blocks of a step that may run here, None for one that may not."""
    cache = packing.cache
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or cache is None
        or packing.watch is not None
        or packing.starts[-1] != len(cache.lengths)
        or not few_rows.by_vectors(packing.starts[-1])
        or not all(cache.lengths)
        or not onednn.plain(embeds_SE, decoder.norm.weight, *cache.keys, *cache.values)
    ):
        return None
    blocks: list[Block] = []
    for layer in decoder.layers:
        block = Block.of(layer)
        if block is None:
            return None
        blocks.append(block)
    return blocks


def hidden(decoder: Any, blocks: list[Block], embeds_SE: Tensor, packing: Packing) -> Tensor:
    """Return the hidden states `[S, E]` of one new row a sequence, as the blocks give them."""
    cache = packing.cache
    assert cache is not None
    angles = decoder.rotary_emb(embeds_SE, packing.position_ids_T[None])
    rotary = tuple(angles_1SK[0, :, None].numpy() for angles_1SK in angles)
    states_SE = embeds_SE.numpy()
    # PyTorch, too, says nothing where numbers grow too large
    with np.errstate(all="ignore"):
        for block in blocks:
            normed_SE = _norm(block.norms[0], states_SE)
            states_SE = states_SE + _attended(block, normed_SE, rotary, cache)
            normed_SE = _norm(block.norms[1], states_SE)
            gate, up, down = block.gated
            gate_SF = _product(gate, normed_SE)
            gated_SF = gate_SF / (1 + np.exp(-gate_SF)) * _product(up, normed_SE)
            states_SE = states_SE + _product(down, gated_SF)
        return torch.from_numpy(_norm(decoder.norm, states_SE))


def _attended(
    block: Block, normed_SE: np.ndarray, rotary: tuple[np.ndarray, ...], cache: KVCache
) -> np.ndarray:
    """Store the rows' keys and values, and return what the attention gives, `[S, E]`."""
    attention, (query, key, value, output) = block.attention, block.attending
    keys, values = cache.keys[attention.layer_idx], cache.values[attention.layer_idx]
    assert keys is not None
    assert values is not None
    count, groups, width = keys.shape[0], keys.shape[1], keys.shape[3]
    q_SHK = _rotated(_product(query, normed_SE).reshape(count, -1, width), rotary)
    k_SGK = _rotated(_product(key, normed_SE).reshape(count, groups, width), rotary)
    v_SGK = _product(value, normed_SE).reshape(count, groups, width)
    # heads of one group are rows that look at the same keys
    q_SGRK = torch.from_numpy(q_SHK.reshape(count, groups, -1, width))
    held = (keys.numpy(), values.numpy())
    parts = []
    for s, length in enumerate(cache.lengths):
        for store, new_SGK in zip(held, (k_SGK, v_SGK), strict=True):
            store[s, :, length] = new_SGK[s]
        own = slice(s, s + 1)
        looked = (keys[own, :, : length + 1], values[own, :, : length + 1])
        parts.append(F.scaled_dot_product_attention(q_SGRK[own], *looked, scale=attention.scaling))
    attended = parts[0] if count == 1 else torch.cat(parts)
    return _product(output, attended.numpy().reshape(count, -1))


def _product(layer: Any, input_SI: np.ndarray) -> np.ndarray:
    parameters = layer._parameters
    output_SO = few_rows.multiply(input_SI, parameters["weight"])
    if (bias := parameters["bias"]) is not None:
        output_SO += few_rows.seen(bias)
    return output_SO


def _norm(norm: Any, states_SE: np.ndarray) -> np.ndarray:
    mean_S = np.vecdot(states_SE, states_SE) / states_SE.shape[1]
    scale_S = 1 / np.sqrt(mean_S + np.float32(norm.variance_epsilon))
    normed_SE: np.ndarray = states_SE * scale_S[:, None] * few_rows.seen(norm.weight)
    return normed_SE


def _rotated(x_SXK: np.ndarray, rotary: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return queries or keys with rotary positions, as `fused.rotate_one` does."""
    cos_S1K, sin_S1K = rotary
    half = x_SXK.shape[2] // 2
    rotated_SXK: np.ndarray = x_SXK * cos_S1K
    rotated_SXK[..., :half] -= x_SXK[..., half:] * sin_S1K[..., :half]
    rotated_SXK[..., half:] += x_SXK[..., :half] * sin_S1K[..., half:]
    return rotated_SXK
