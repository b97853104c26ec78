"""Elementwise steps of a LLaMA block: by liger-kernel (arXiv 2410.10989) on CUDA where installed.

On a GPU each step of a formula is a kernel that reads and writes everything; one kernel for all of
them saves that time, the host's time to launch them, and what they keep for the backward pass.

Shapes: T rows, H query heads, G key-value heads, K head dimension, F width of the hidden layer.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from llavakit_kernels.linear_cross_entropy import liger

SILU = ("SiLU", "SiLUActivation")  # torch's, and that of some versions of transformers
Rotary: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines `[T, 1, K]` of the positions' angles, each of them twice in a row."""


def rotate(q_THK: Tensor, k_TGK: Tensor, rotary: Rotary) -> Rotary:
    """Return queries and keys with rotary positions (arXiv 2104.09864).

    As in transformers, the two numbers of a pair are K/2 apart, and not neighbours as in the paper.
    liger-kernel writes over `q_THK` and `k_TGK`: nothing else may read them.
    """
    if not _served(q_THK):
        return rotate_one(q_THK, rotary), rotate_one(k_TGK, rotary)
    from liger_kernel.ops.rope import LigerRopeFunction

    cos_1TK, sin_1TK = (angles_T1K.transpose(0, 1) for angles_T1K in rotary)
    heads_first = (x_TXK[None].transpose(1, 2) for x_TXK in (q_THK, k_TGK))
    q_1HTK, k_1GTK = LigerRopeFunction.apply(*heads_first, cos_1TK, sin_1TK)
    return q_1HTK[0].transpose(0, 1), k_1GTK[0].transpose(0, 1)


def rotate_one(x_TXK: Tensor, rotary: Rotary) -> Tensor:
    """Return queries or keys `[T, heads, K]` with rotary positions, by the formula."""
    cos_T1K, sin_T1K = rotary
    left, right = x_TXK.chunk(2, dim=-1)
    return x_TXK * cos_T1K + torch.cat((-right, left), dim=-1) * sin_T1K


def gate(activation: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return `activation(gate_TF) * up_TF`."""
    if type(activation).__name__ not in SILU or not _served(gate_TF):
        gated_TF: Tensor = activation(gate_TF) * up_TF
        return gated_TF
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    served_TF: Tensor = LigerSiLUMulFunction.apply(gate_TF, up_TF)
    return served_TF


def _served(tensor: Tensor) -> bool:
    """Say whether liger-kernel computes with a tensor; a compiler fuses the formula by itself."""
    return liger.INSTALLED and tensor.is_cuda and not torch.compiler.is_compiling()
