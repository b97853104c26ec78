"""Triton kernels on plain tensors, each with an eager reference in PyTorch.

Shapes: N visual tokens, T rows of the packed stream, D width of the features, H width of a hidden
layer, E width of the language model, V vocabulary, M supervised rows.

    stream = project_splice(features, weight, bias, token_ids, embedding, visual_rows)     # linear

    hidden = linear_gelu(features, weight_1, bias_1)                                       # mlp
    stream = project_splice(hidden, weight_2, bias_2, token_ids, embedding, visual_rows)

    loss = linear_cross_entropy(hidden, head_weight, targets, reduction="sum")

For torch.compile, FSDP2, autocast and export each function is a single torch.library operator. Each
takes `impl="auto" | "reference" | "triton" | "onednn"`; the loss has "liger" instead of "triton".
`onednn` multiplies float32 matrices on a CPU by that library.
"""

from llavakit_kernels.linear_cross_entropy import linear_cross_entropy
from llavakit_kernels.linear_gelu import linear_gelu
from llavakit_kernels.project_splice import project_splice, row_sources

__all__ = ["linear_cross_entropy", "linear_gelu", "project_splice", "row_sources"]
