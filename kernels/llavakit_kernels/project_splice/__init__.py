"""Projects visual features and writes them to their rows of the packed stream, beside the text.

    out[r] = features[i] @ weight.T + bias     where visual_rows[i] == r
           = embedding[token_ids[r]]           elsewhere

In eager PyTorch this is a product, a gather and a scatter, each through memory; transformers also
fills zeros and calls masked_scatter. On a GPU it is one launch that writes each element once.
LLaVA (arXiv 2304.08485, section 4.1): H_v = W Z_v, placed within the embedded instruction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llavakit_kernels import arguments
from llavakit_kernels.arguments import Impl, require
from llavakit_kernels.operators import Operator
from llavakit_kernels.project_splice import reference

__all__ = ["project_splice", "row_sources"]


def project_splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
    *,
    sources: Tensor | None = None,
    impl: Impl = "auto",
    check: bool = False,
    deterministic: bool = True,
) -> Tensor:
    """Return the embedded stream [T, E] of text rows and projected visual rows.

    features: [N, D]; weight: [E, D]; bias: [E] or None; one floating dtype for these three (under
    torch.autocast they are cast to its dtype).
    token_ids: [T] int; values at visual rows are not used as ids and may be anything.
    embedding: [V, E], any floating dtype, which is also the result's.
    visual_rows: [N] int, the row of each visual token, in any order, no row twice.
    sources: [T] int32 from `row_sources(visual_rows, T)`, for callers that splice several times
    with the same rows; computed here if None.
    impl: the kernels ("triton"), eager PyTorch ("reference"), or the kernels on an NVIDIA GPU of
    compute capability 8.0 or newer in bfloat16, float16 or float32 ("auto"). float32 products are
    exact unless torch.set_float32_matmul_precision allows tf32. "onednn" is "reference" with the
    products of `llavakit_kernels.onednn`.
    check: also refuse visual rows that repeat or lie outside of [0, T), and text ids outside of
    [0, V). This waits for the device. Without it such input gives wrong rows.
    deterministic: the embedding's gradient adds rows in a fixed order; otherwise by atomics.

    Rows may have any stride; a last dimension that is not contiguous is copied first. Features,
    weight, bias and embedding get gradients; only those that are needed are computed.

    Raises ValueError if a shape, dtype, device or (with check) index does not fit.
    """
    N, T = visual_rows.shape[0], token_ids.shape[0]
    _require_fit(features, weight, bias, token_ids, embedding, visual_rows, sources)
    if check:
        _check_rows(visual_rows, T)
    if sources is None:
        sources = row_sources(visual_rows, T)
    if check:
        _check_ids(token_ids, sources, embedding.shape[0], N)
    dtype = arguments.autocast_dtype(features.device)
    if dtype is not None:
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    arguments.require_same_dtype(features=features, weight=weight, bias=bias)
    with arguments.without_autocast(features.device):
        out: Tensor = _splice(
            features,
            weight,
            bias,
            token_ids,
            embedding,
            visual_rows,
            sources,
            impl,
            deterministic,
        )
    return out


def row_sources(visual_rows: Tensor, rows: int) -> Tensor:
    """Return for each row of the stream its visual token, or -1 for text: [rows] int32.

    visual_rows: [N] int. The result is its inverse, computed without waiting for the device. One
    result serves all splices of a micro-batch and their backward passes.
    """
    numbers = torch.arange(visual_rows.shape[0], dtype=torch.int32, device=visual_rows.device)
    sources = torch.full((rows,), -1, dtype=torch.int32, device=visual_rows.device)
    return sources.scatter_(0, visual_rows.long(), numbers)


def _require_fit(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
    sources: Tensor | None,
) -> None:
    arguments.require_shape("features", features, "ND", None, None)
    N, D = features.shape
    arguments.require_shape("weight", weight, "ED", None, D)
    E = weight.shape[0]
    arguments.require_shape("token_ids", token_ids, "T", None)
    arguments.require_shape("embedding", embedding, "VE", None, E)
    arguments.require_shape("visual_rows", visual_rows, "N", N)
    T = token_ids.shape[0]
    if N > T:
        raise ValueError(
            f"`visual_rows` names {N} rows, but `token_ids` makes a stream of only {T}"
        )
    if bias is not None:
        arguments.require_shape("bias", bias, "E", E)
    if sources is not None:
        arguments.require_shape("sources", sources, "T", T)
        if sources.dtype != torch.int32:
            raise ValueError(
                f"`sources` must be int32, but is {sources.dtype}: take it from row_sources()"
            )
    arguments.require_indices("token_ids", token_ids)
    arguments.require_indices("visual_rows", visual_rows)
    if not embedding.is_floating_point():
        raise ValueError(f"`embedding` must be floating point, but is {embedding.dtype}")
    arguments.require_same_device(
        features=features,
        weight=weight,
        bias=bias,
        token_ids=token_ids,
        embedding=embedding,
        visual_rows=visual_rows,
        sources=sources,
    )


def _check_rows(visual_rows: Tensor, rows: int) -> None:
    wrong = visual_rows[(visual_rows < 0) | (visual_rows >= rows)]
    if wrong.numel():
        raise ValueError(
            f"`visual_rows` holds {wrong.numel()} rows outside of the stream's {rows}, the first "
            f"of them {int(wrong[0])}: rows count from 0 within the micro-batch"
        )
    values, counts = torch.unique(visual_rows, return_counts=True)
    twice = values[counts > 1]
    if twice.numel():
        raise ValueError(
            f"`visual_rows` names row {int(twice[0])} more than once ({twice.numel()} rows are "
            "repeated): each visual token needs a row of its own"
        )


def _check_ids(token_ids: Tensor, sources: Tensor, V: int, N: int) -> None:
    visual = int((sources >= 0).sum())
    require(
        visual == N,
        f"`sources` marks {visual} visual rows but `visual_rows` names {N}: take it from "
        "row_sources(visual_rows, rows) of this micro-batch",
    )
    wrong = token_ids[(sources < 0) & ((token_ids < 0) | (token_ids >= V))]
    if wrong.numel():
        raise ValueError(
            f"`token_ids` holds {wrong.numel()} text ids outside of the embedding's {V} rows, the "
            f"first of them {int(wrong[0])}: mark its row in `visual_rows`, or resize the embedding"
        )


def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
    sources: Tensor,
    impl: str,
    deterministic: bool,
) -> Tensor:
    given = (features, weight, bias, token_ids, embedding, visual_rows, sources)
    if arguments.choose(impl, features, embedding) == "reference":
        return reference.forward(*given, impl=impl)
    from llavakit_kernels.project_splice import triton

    return triton.forward(*given)


_splice = Operator("project_splice", _forward)


@_splice.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
    sources: Tensor,
    impl: str,
    deterministic: bool,
) -> Tensor:
    return embedding.new_empty(token_ids.shape[0], embedding.shape[1])


def _features_grad(grad: Tensor, weight: Tensor, visual_rows: Tensor, impl: str) -> Tensor:
    if arguments.choose(impl, grad, weight) == "reference":
        return reference.features_grad(grad, weight, visual_rows, impl)
    from llavakit_kernels.project_splice import triton_backward

    return triton_backward.features_grad(grad, weight, visual_rows)


_for_features = Operator("project_splice_features_grad", _features_grad)


@_for_features.register_fake
def _(grad: Tensor, weight: Tensor, visual_rows: Tensor, impl: str) -> Tensor:
    return weight.new_empty(visual_rows.shape[0], weight.shape[1])


def _weight_grad(
    grad: Tensor, features: Tensor, visual_rows: Tensor, with_bias: bool, impl: str
) -> tuple[Tensor, Tensor]:
    if arguments.choose(impl, grad, features) == "reference":
        return reference.weight_grad(grad, features, visual_rows, with_bias, impl)
    from llavakit_kernels.project_splice import triton_backward

    return triton_backward.weight_grad(grad, features, visual_rows, with_bias)


_for_weight = Operator("project_splice_weight_grad", _weight_grad)


@_for_weight.register_fake
def _(
    grad: Tensor, features: Tensor, visual_rows: Tensor, with_bias: bool, impl: str
) -> tuple[Tensor, Tensor]:
    E = grad.shape[1]
    return features.new_empty(E, features.shape[1]), features.new_empty(E if with_bias else 0)


def _embedding_grad(
    grad: Tensor,
    token_ids: Tensor,
    sources: Tensor,
    vocabulary: int,
    visual: int,
    impl: str,
    deterministic: bool,
) -> Tensor:
    if arguments.choose(impl, grad) == "reference":
        return reference.embedding_grad(grad, token_ids, sources, vocabulary, visual)
    from llavakit_kernels.project_splice import triton_embedding

    return triton_embedding.embedding_grad(grad, token_ids, sources, vocabulary, deterministic)


_for_embedding = Operator("project_splice_embedding_grad", _embedding_grad)


@_for_embedding.register_fake
def _(
    grad: Tensor,
    token_ids: Tensor,
    sources: Tensor,
    vocabulary: int,
    visual: int,
    impl: str,
    deterministic: bool,
) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, _, token_ids, embedding, visual_rows, sources, impl, deterministic = inputs
    for_features, for_weight, for_bias, _, for_embedding, *_ = ctx.needs_input_grad
    # Save only what the needed gradients read: the rest may be freed after the forward pass.
    ctx.save_for_backward(
        features if for_weight or for_bias else None,
        weight if for_features else None,
        token_ids if for_embedding else None,
        visual_rows,
        sources if for_embedding else None,
    )
    ctx.vocabulary, ctx.visual = embedding.shape[0], features.shape[0]
    ctx.impl, ctx.deterministic = impl, deterministic


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, weight, token_ids, visual_rows, sources = ctx.saved_tensors
    for_features, for_weight, for_bias, _, for_embedding, *_ = ctx.needs_input_grad
    d_features = d_weight = d_bias = d_embedding = None
    if for_features:
        d_features = _for_features(grad, weight, visual_rows, ctx.impl)
    if for_weight or for_bias:
        d_weight, d_bias = _for_weight(grad, features, visual_rows, for_bias, ctx.impl)
    if for_embedding:
        d_embedding = _for_embedding(
            grad, token_ids, sources, ctx.vocabulary, ctx.visual, ctx.impl, ctx.deterministic
        )
    return (
        d_features,
        d_weight if for_weight else None,
        d_bias if for_bias else None,
        None,
        d_embedding,
        *(None,) * 4,
    )


_splice.register_autograd(_backward, setup_context=_setup_context)
