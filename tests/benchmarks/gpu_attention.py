"""Attention of the packed stream against float64: a section of gpu.py.

Every kernel that may serve a layer, forward and backward: plain, with a sliding window, grouped
queries, a soft cap, sinks; a cache that is decoded with; and that no sample sees another. On a CPU
the same checks run over what serves there, so that they themselves are known to be right.

T rows, S samples, H query heads, G key-value heads, K head dimension; in one sample Q rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from tests.benchmarks.gpu_session import DEVICE, DRY, Session, relative_error
from torch import Tensor

from llavakit import packed_attention
from llavakit.contracts.packing import KVCache, Packing, Scoring
from llavakit_plugins.language import varlen

Kernel = Callable[[Tensor, Tensor, Tensor, Packing, Scoring], Tensor]
Heads = tuple[int, int, int]  # H, G, K

LENGTHS = (17, 1, 29) if DRY else (278, 1, 1021, 577, 64)
PLAIN, GROUPED = ((4, 4, 16), (4, 2, 16)) if DRY else ((16, 16, 128), (16, 4, 128))
NARROW: Heads = (4, 2, 16) if DRY else (16, 2, 64)
# Norm-wise; the gradients go through two products more. Eager code also rounds its weights.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16) if DRY else (torch.bfloat16, torch.float16)
WINDOW = 7 if DRY else 128


def attention(session: Session) -> None:
    """Check what is quick first: each of FlexAttention's variants is compiled for seconds."""
    for dtype in DTYPES:
        for heads in (PLAIN, GROUPED):
            for scoring in (Scoring(), Scoring(window=WINDOW, scale=0.11)):
                _check_all(session, whole_kernels(), heads, scoring, dtype)
    sinks_H = torch.linspace(-2, 3, NARROW[0], device=DEVICE)
    capped = Scoring(softcap=1.5)
    for scoring in (Scoring(), capped, Scoring(window=WINDOW), Scoring(sinks_H=sinks_H)):
        heads = NARROW if scoring.sinks_H is not None else GROUPED
        check_decoding(session, heads, scoring, DTYPES[-2])
    for name, kernel in whole_kernels().items():
        check_isolation(session, name, kernel, Scoring())
    for scoring, heads in (
        (capped, PLAIN),  # Gemma 2
        (Scoring(sinks_H=sinks_H, window=WINDOW), NARROW),  # gpt-oss
        (replace(capped, window=WINDOW), GROUPED),
        (Scoring(), (2, 2, 24) if DRY else (4, 4, 512)),  # wider than FlashAttention
    ):
        if not session.time_for(f"flex {describe(scoring, heads)}", 0 if DRY else 12):
            return
        _check_all(session, {"flex": flex}, heads, scoring, DTYPES[0])
    check_isolation(session, "flex", flex, capped)


def whole_kernels() -> dict[str, Kernel]:
    """The kernels for plain scoring that are here, and what serves without any."""
    found: dict[str, Kernel] = {"packed_attention": chosen}
    if not DRY:
        found["torch"] = varlen.torch_attention
        if varlen._has_flash_attn():
            found["flash-attn"] = varlen.flash_attention
    return found


def chosen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """What the model calls: it chooses a kernel, or on a CPU reads each sample by itself."""
    return packed_attention(
        q, k, v, packing, layer=0, scale=scoring.scale, window=scoring.window,
        softcap=scoring.softcap, sinks_H=scoring.sinks_H,
    )  # fmt: skip


def flex(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """FlexAttention: compiled, but on a CPU, where only its formula has gradients."""
    if not DRY:
        return varlen.compiled_flex_attention(q, k, v, packing, scoring)
    import warnings
    from unittest import mock

    from torch.nn.attention import flex_attention as own

    with warnings.catch_warnings(), mock.patch.object(own, "_validate_device"):
        warnings.simplefilter("ignore")  # that it is not compiled
        given = (own.flex_attention, own.create_block_mask)
        return varlen.flex_attention(q, k, v, packing, scoring, *given)


def describe(scoring: Scoring, heads: Heads) -> str:
    told = [f"{heads[0]}/{heads[1]} heads of {heads[2]}"]
    told += ["window"] * (scoring.window is not None) + ["cap"] * (scoring.softcap is not None)
    return " ".join(told + ["sinks"] * (scoring.sinks_H is not None))


def written_out(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scoring: Scoring) -> Tensor:
    """Return the formula's result in float64, `[T, H, K]`, for samples of LENGTHS."""
    outputs = []
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    scale = q_THK.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    for begin, end in pairwise((0, *torch.tensor(LENGTHS).cumsum(0).tolist())):
        q, k, v = (x[begin:end].double() for x in (q_THK, k_TGK, v_TGK))
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores_HQQ = torch.einsum("qhd,chd->hqc", q, k) * scale
        if scoring.softcap is not None:
            scores_HQQ = scoring.softcap * (scores_HQQ / scoring.softcap).tanh()
        row = torch.arange(end - begin, device=q.device)
        distance = row[:, None] - row[None, :]
        hidden = (distance < 0) | (distance >= (scoring.window or end))
        weights_HQQ = scores_HQQ.masked_fill(hidden, float("-inf")).exp()
        total_HQ1 = weights_HQQ.sum(-1, keepdim=True)
        if scoring.sinks_H is not None:
            total_HQ1 = total_HQ1 + scoring.sinks_H.double().exp()[:, None, None]
        outputs.append(torch.einsum("hqc,chd->qhd", weights_HQQ / total_HQ1, v))
    return torch.cat(outputs)


def stream(heads: Heads, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries, keys and values of a stream."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    H, G, K = heads
    q, k, v = (
        torch.randn(sum(LENGTHS), n, K, generator=draw, device=DEVICE).to(dtype) for n in (H, G, G)
    )
    return q, k, v


def _check_all(
    session: Session,
    kernels: dict[str, Kernel],
    heads: Heads,
    scoring: Scoring,
    dtype: torch.dtype,
) -> None:
    for name, kernel in kernels.items():
        try:
            check(session, name, kernel, heads, scoring, dtype)
        except Exception as error:  # one that does not compile does not end the others
            told = " ".join(str(error).split())
            session.row(
                "attention", kernel=name, what=describe(scoring, heads), of="runs",
                dtype=str(dtype), error=float("inf"), limit=0.0, said=told[:600],
            )  # fmt: skip


def check(
    session: Session,
    name: str,
    kernel: Kernel,
    heads: Heads,
    scoring: Scoring,
    dtype: torch.dtype,
) -> None:
    """Compare a kernel's output and gradients, of the sinks too, with the formula's."""
    leaves = [x.requires_grad_() for x in stream(heads, dtype)]
    expected_leaves = [x.detach().double().requires_grad_() for x in leaves]
    told = ["q", "k", "v"]
    own, other = scoring, scoring
    if scoring.sinks_H is not None:
        mine, theirs = (scoring.sinks_H.to(t).requires_grad_() for t in (dtype, torch.float64))
        theirs.data.copy_(mine.data)
        own, other = replace(scoring, sinks_H=mine), replace(scoring, sinks_H=theirs)
        leaves, expected_leaves, told = [*leaves, mine], [*expected_leaves, theirs], [*told, "s"]
    out = kernel(leaves[0], leaves[1], leaves[2], Packing.of(LENGTHS, DEVICE), own)
    expected = written_out(expected_leaves[0], expected_leaves[1], expected_leaves[2], other)
    grad = torch.randn(out.shape, device=DEVICE).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, expected_leaves, grad.double())
    pairs = {"out": (out, expected), **{f"d{n}": p for n, *p in zip(told, found, wanted)}}  # noqa: B905
    for of, (actual, right) in pairs.items():
        session.row(
            "attention",
            kernel=name,
            what=describe(scoring, heads),
            of=of,
            dtype=str(dtype).removeprefix("torch."),
            error=relative_error(actual.detach(), right.detach()),
            limit=LIMITS[dtype] * (1 if of == "out" else 2),
        )


def check_decoding(session: Session, heads: Heads, scoring: Scoring, dtype: torch.dtype) -> None:
    """Read most of each sample as a prompt, then one row at a time, as answers are written."""
    q, k, v = stream(heads, dtype)
    expected = written_out(q, k, v, scoring)
    steps = 3
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()][:-1]
    kept = [s for s, length in enumerate(LENGTHS) if length > steps]
    cache = KVCache(1, [LENGTHS[s] for s in kept])
    worst = 0.0
    spans = [(0, LENGTHS[s] - steps) for s in kept]
    for _ in range(steps + 1):
        rows = torch.cat([torch.arange(starts[s] + a, starts[s] + b) for s, (a, b) in
                          zip(kept, spans, strict=True)]).to(DEVICE)  # fmt: skip
        positions = torch.cat([torch.arange(a, b) for a, b in spans]).to(DEVICE)
        ends = torch.tensor([b - a for a, b in spans]).cumsum(0).tolist()
        packing = Packing((0, *ends), positions, cache)
        found = chosen(q[rows], k[rows], v[rows], packing, scoring)
        worst = max(worst, relative_error(found, expected[rows]))
        cache.advance(packing)
        spans = [(b, b + 1) for _, b in spans]
    session.row(
        "attention", kernel="cache", what=describe(scoring, heads), of="answers",
        dtype=str(dtype).removeprefix("torch."), error=worst, limit=LIMITS[dtype],
    )  # fmt: skip


def check_isolation(session: Session, name: str, kernel: Kernel, scoring: Scoring) -> None:
    """Change one sample: not a bit of the others' may change, nor of their gradients."""
    dtype = DTYPES[-1] if name != "flex" else DTYPES[0]
    first, other = stream(PLAIN, dtype), stream(PLAIN, dtype, seed=1)
    begin, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool, device=DEVICE)
    outside[begin:end] = False
    grad = torch.randn(first[0].shape, device=DEVICE).to(dtype)
    results = []
    for changed in (False, True):
        leaves = [
            torch.where(outside[:, None, None] | (not changed), a, b).requires_grad_()
            for a, b in zip(first, other, strict=True)
        ]
        out = kernel(leaves[0], leaves[1], leaves[2], Packing.of(LENGTHS, DEVICE), scoring)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    apart = [float((a[outside] - b[outside]).abs().max().detach()) for a, b in zip(*results)]  # noqa: B905
    # some backward passes add in the order that programs happen to finish in
    for of, error in (("out", apart[0]), ("gradients", max(apart[1:]))):
        session.row(
            "attention", kernel=name, what="isolation", of=of,
            dtype=str(dtype).removeprefix("torch."), error=error,
            limit=0.0 if of == "out" or DRY else LIMITS[dtype],
        )  # fmt: skip
